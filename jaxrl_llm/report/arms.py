"""Names, colours and line styles of the arms: the same on every chart of a page."""

from __future__ import annotations

from jaxrl_llm.report.svg import esc, tag

DASHES = (None, "7 4", "2 4", "10 4 2 4")  # a second cue beside colour
NUM_COLOURS = 6  # --c0 ... --c5 in page.css; the baseline and the main arm have their own


class Arms:
    """Looks up how an arm is shown. Unlisted labels (the evaluation sets of a single run) get colours in order of first use."""

    def __init__(self, infos: list[dict]):
        self._infos = {info["name"]: info for info in infos}
        self._styles: dict[str, tuple[str, str | None]] = {}
        self._next = 0
        for info in infos:
            self._assign(info["name"])

    def _assign(self, name: str) -> None:
        role = self.role(name)
        if name == "base" and name not in self._infos:
            self._styles[name] = ("var(--muted)", "1 5")
        elif role == "baseline":
            self._styles[name] = ("var(--baseline)", None)
        elif role == "main" or (not self._infos and not self._styles):
            self._styles[name] = ("var(--main)", None)
        else:
            colour, dash = self._next % NUM_COLOURS, DASHES[self._next // NUM_COLOURS % len(DASHES)]
            self._styles[name] = (f"var(--c{colour})", dash)
            self._next += 1

    def role(self, name: str) -> str:
        return self._infos.get(name, {}).get("role", "other")

    def label(self, name: str) -> str:
        return self._infos.get(name, {}).get("label", name)

    def about(self, name: str) -> str:
        return self._infos.get(name, {}).get("about", "")

    def colour(self, name: str) -> str:
        if name not in self._styles:
            self._assign(name)
        return self._styles[name][0]

    def dash(self, name: str) -> str | None:
        self.colour(name)
        return self._styles[name][1]

    @property
    def listed(self) -> bool:
        """Whether the page has arms, or just labels."""
        return bool(self._infos)

    @property
    def baseline(self) -> str:
        """The baseline as a sentence calls it."""
        return next((self.label(name) for name in self._infos if self.role(name) == "baseline"), "the baseline")

    @property
    def main(self) -> str | None:
        return next((name for name in self._infos if self.role(name) == "main"), None)

    def is_strong(self, name: str) -> bool:
        """Drawn thick: the main arm and the baseline, or every line where no arm has such a role."""
        roles = {self.role(n) for n in self._infos}
        return self.role(name) in ("main", "baseline") or not roles & {"main", "baseline"}

    def drawing_order(self, names: list[str]) -> list[str]:
        """The important arms last, so that they lie on top."""
        rank = {"baseline": 1, "main": 2}
        return sorted(names, key=lambda name: rank.get(self.role(name), 0))

    def reading_order(self, names: list[str]) -> list[str]:
        """The main arm, the baseline, then the others as given."""
        rank = {"main": 0, "baseline": 1}
        return sorted(names, key=lambda name: rank.get(self.role(name), 2))

    def swatch(self, name: str) -> str:
        """A short piece of the arm's line, for tables and legends."""
        dash = self.dash(name)
        stroke = f'<line x1="1" y1="6" x2="19" y2="6" style="stroke:{self.colour(name)}"'
        stroke += (f' stroke-dasharray="{dash}"' if dash else "") + "/>"
        return f'<svg class="swatch" viewBox="0 0 20 12" aria-hidden="true">{stroke}</svg>'

    def legend(self, names: list[str]) -> str:
        items = "".join(tag("li", self.swatch(name) + esc(self.label(name))) for name in names)
        return tag("ul", items, cls="legend")
