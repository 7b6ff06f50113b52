"""What a compiled program costs: memory a device, bytes between devices, and the least time that a slice needs for it.

What the compiler says of memory is taken from it. Its counts of FLOPs and bytes take the body of a loop once, so FLOPs come from the model's
formulas, and what travels between devices from the program's text, with each loop's number of rounds.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What its maker publishes of a chip: GiB of memory, dense bf16 FLOP/s, bytes/s from its memory, and that it receives over its links to
    other chips. tpu: whether a compiler for it runs where there is none."""

    memory_gib: float
    flops: float
    memory_rate: float
    link_rate: float
    tpu: bool = True


# TPUs: cloud.google.com/tpu/docs, a page a version. GPUs: NVIDIA's data sheets of the SXM boards, dense (half of "with sparsity"), with half
# of NVLink's total of 600 or 900 GB/s, which is what comes in while as much goes out; of their 80 and 141 GB what is left of the
# driver's 81,920, 81,559 and 143,771 MiB when a process has begun, in whole GiB.
CHIPS = {
    "v4": Chip(32, 275e12, 1228e9, 300e9),
    "v5e": Chip(16, 197e12, 819e9, 200e9),
    "v5p": Chip(95, 459e12, 2765e9, 600e9),
    "v6e": Chip(32, 918e12, 1640e9, 448e9),
    "a100": Chip(79, 312e12, 2039e9, 300e9, tpu=False),
    "h100": Chip(79, 989e12, 3350e9, 450e9, tpu=False),
    "h200": Chip(139, 989e12, 4800e9, 450e9, tpu=False),
}


def compiled(program: Any, *arguments: Any, endless: int = 1) -> dict[str, Any]:
    """Bytes a device of a jitted program, compiled for arguments that are shapes; the donated state is counted once. `collectives`: see
    `collectives`, with loops whose end the data decides run `endless` times at most.

    A TPU's compiler refuses a program that does not fit: `refused` is then its message, and the working memory what that tells.
    """
    import jax

    try:
        made = program.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refused, own = " ".join(str(error).split())[:400], bytes_a_device(arguments)
        working = bytes_named(refused)
        total = None if working is None else own + working
        sizes = {"argument_bytes": own, "output_bytes": None, "temporary_bytes": working, "total_bytes": total}
        return sizes | {"collectives": None, "refused": refused}
    found = made.memory_analysis()
    own, working = int(found.argument_size_in_bytes), int(found.temp_size_in_bytes)
    outputs = int(found.output_size_in_bytes) - int(found.alias_size_in_bytes)
    sizes = {"argument_bytes": own, "output_bytes": outputs, "temporary_bytes": working, "total_bytes": own + outputs + working}
    return sizes | {"collectives": collectives(made.as_text(), endless), "refused": ""}


def bytes_a_device(arguments: Any) -> int:
    """What one device holds of arrays that are shapes with shardings; those without one are small (a random key)."""
    import jax

    placed = [leaf for leaf in jax.tree.leaves(arguments) if getattr(leaf, "sharding", None) is not None]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in placed)


def bytes_named(message: str) -> int | None:
    """The working memory that a compiler's refusal names: "... HLO temporaries (20.82G) exceeds ..." or "... reserved 258.03M program 14.67G
    arguments 1.33G ..."; None where it names none."""
    found = re.search(r"(?:temporaries \(|\bprogram (?=[\d.]+[KMGT] arguments))([\d.]+)([KMGT])", message)
    return int(float(found.group(1)) * 1024 ** (" KMGT".index(found.group(2)))) if found else None


def roofline(chip: Chip, devices: int, flops: float, read_bytes: float, moved: Mapping[str, float] | None) -> dict[str, float]:
    """Seconds that a step needs at least: of arithmetic, of reading `read_bytes` a device from memory, and over the links, each at the
    published rate; `seconds` is the longest of them, as if they went on side by side."""
    parts = {
        "compute": flops / (chip.flops * devices),
        "memory": read_bytes / chip.memory_rate,
        "links": sum((moved or {}).values()) / chip.link_rate,
    }
    return parts | {"seconds": max(parts.values())}


# --- the text of a compiled program ----------------------------------------------------------------------------------

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_COLLECTIVE = re.compile(rf"= (\(?.*?\)?) ({'|'.join(_KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+)(\d*)(?:e\d+m\d+\w*)?\[([\d,]*)\]")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BRANCHES = re.compile(r" conditional\(.*?branch_computations=\{([^}]*)\}")
_TWO_BRANCHES = re.compile(r" conditional\(.*true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)")
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


def collectives(text: str, endless: int = 1) -> dict[str, float]:
    """{kind of collective: bytes that a device receives in one run} of a compiled program's text (HLO).

    A loop counts as often as the largest number in its condition says, which for a loop that the data may end sooner is the most rounds;
    where there is none, `endless` times. Of branches the one that moves most counts.
    """
    bodies: dict[str, list[str]] = {}
    entry, here = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            here = bodies.setdefault(head.group(1), [])
            entry = head.group(1) if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            here = None
        elif here is not None:
            here.append(line)

    module = re.search(r"(?:num_partitions|replica_count)=(\d+)", text)
    devices = int(module.group(1)) if module else 1

    def rounds(condition: str) -> int:
        lines = list(_with_callees(bodies, condition))
        numbers = [int(n) for line in lines for n in re.findall(r"\bs32\[\]\S* constant\((\d+)\)", line)]
        return max(numbers, default=endless)

    @functools.cache
    def moved(name: str) -> dict[str, tuple[str, float]]:
        """{channel: (kind, bytes)}; start and end of one transfer, and its copies in fusions, bear one channel."""
        total: dict[str, tuple[str, float]] = {}

        def add(found: Mapping[str, tuple[str, float]], times: int = 1) -> None:
            for channel, (kind, size) in found.items():
                total[channel] = kind, max(size * times, total.get(channel, (kind, 0.0))[1])

        for number, line in enumerate(bodies.get(name, ())):
            if found := _COLLECTIVE.search(line):
                channel = re.search(r"channel_id=(\d+)", line)
                add({channel.group(1) if channel else f"{name} {number}": (found.group(2), _received(found, line, devices))})
            elif loop := _LOOP.search(line):
                add(moved(loop.group(2)), rounds(loop.group(1)))
            elif branches := _BRANCHES.search(line) or _TWO_BRANCHES.search(line):
                names = branches.groups() if len(branches.groups()) == 2 else branches.group(1).split(",")
                each = [moved(branch.strip().lstrip("%")) for branch in names]
                add(max(each, key=lambda one: sum(size for _, size in one.values())))
            else:
                for callee in _CALLS.findall(line):
                    add(moved(callee))
        return total

    sums: dict[str, float] = {}
    for kind, size in moved(entry).values():
        sums[kind] = sums.get(kind, 0.0) + size
    return sums


def _with_callees(bodies: Mapping[str, list[str]], name: str) -> Iterator[str]:
    for line in bodies.get(name, ()):
        yield line
        for callee in _CALLS.findall(line):
            yield from _with_callees(bodies, callee)


def _received(found: re.Match, line: str, devices: int) -> float:
    """Bytes that a device receives by one collective on a ring of its group."""
    result, kind, start = found.group(1), found.group(2), found.group(3)
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * (1 if letters == "pred" else int(bits or 8) / 8)
        for letters, bits, dims in _SHAPE.findall(result)
    ]
    if start and kind == "collective-permute":
        sizes = sizes[1:2]  # operand, result, then two marks
    elif start and kind != "all-reduce":
        sizes = sizes[len(sizes) // 2 :]  # operands, then results
    size, group = sum(sizes), _group(line) or devices
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        return size * (group - 1)
    return size * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def _group(line: str) -> int:
    """How many devices take part in one exchange, as the text says in one of its three ways."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named.group(2)))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota.group(2))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed.group(1).split(","))
    return 0  # "{}": all devices
