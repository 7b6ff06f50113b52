"""Writes tests/golden/preference.json: preference losses by TRL's own code on random log-probabilities.

Run `python tests/make_golden_preference.py` where torch, transformers and TRL 1.16 are installed. TRL's trainers need a model and a data
set; here their loss methods run on a stand-in whose model answers with the log-probabilities (or logits) that are stored.
"""

import collections
import json
import types
from pathlib import Path

import numpy as np
import torch
import transformers
import trl
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

GOLDEN = Path(__file__).resolve().parent / "golden" / "preference.json"
PAIRS, WIDTH, VOCAB = 4, 7, 11  # WIDTH: one prompt token and up to six of a completion
LENGTHS = np.array([[6, 3], [2, 5], [4, 4], [1, 6]])  # completion tokens of (chosen, rejected)


def inputs(seed=0):
    """(tokens [2P, W], logits [2P, W, V], mask [2P, W] on the completions, ref_sums [2P]); the chosen rows come first, as in TRL."""
    rng = np.random.default_rng(seed)
    tokens = torch.tensor(rng.integers(0, VOCAB, (2 * PAIRS, WIDTH)))
    logits = torch.tensor(rng.normal(0, 1.5, (2 * PAIRS, WIDTH, VOCAB)), dtype=torch.float32)
    lengths = torch.tensor(LENGTHS.T.reshape(-1, 1))
    mask = (torch.arange(WIDTH) >= 1) & (torch.arange(WIDTH) <= lengths)
    logps = token_logps(tokens, logits, mask)
    return tokens, logits, mask, logps.sum(-1) + torch.tensor(rng.normal(0, 2.0, 2 * PAIRS), dtype=torch.float32)


def token_logps(tokens, logits, mask):
    """[N, W - 1] log-probability of each completion token, 0 elsewhere."""
    picked = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return torch.where(mask[:, 1:], picked, 0.0)


class Same:
    """An accelerator of one process."""

    device = torch.device("cpu")
    gather = gather_for_metrics = staticmethod(lambda x: x)


def stand_in(trainer, **settings):
    """An object with TRL's methods and the settings that they read."""
    mode = types.SimpleNamespace(training=True)
    made = types.SimpleNamespace(
        accelerator=Same(), model=mode, aux_loss_enabled=False, ld_alpha=None, use_weighting=False, label_smoothing=0.0, loss_weights=[1.0],
        f_divergence_type="reverse_kl", precompute_ref_logps=True, is_encoder_decoder=False, padding_value=0, pad_token_id=0, _tp_size=1,
        _total_train_tokens=0, _metrics=collections.defaultdict(lambda: collections.defaultdict(list)), **settings,
    )  # fmt: skip
    for name in ("_compute_loss", "_compute_kl_logps", "concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer, name):
            setattr(made, name, types.MethodType(getattr(trainer, name), made))
    for name in ("concatenated_inputs", "get_batch_logps"):
        if hasattr(trainer, name):
            setattr(made, name, getattr(trainer, name))
    return made


def model_of(logps):
    """A model that answers with per-token log-probabilities, and zeros for what TRL only logs."""

    def model(labels=None, **_):
        zeros = torch.zeros_like(logps)
        return types.SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    model.training = True
    return model


def dpo(kind, beta, label_smoothing=0.0):
    tokens, logits, mask, ref = inputs()
    trainer = stand_in(DPOTrainer, beta=beta, loss_types=[kind])
    trainer.label_smoothing = label_smoothing
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "completion_mask": mask.long()}
    batch |= {"ref_chosen_logps": ref[:PAIRS], "ref_rejected_logps": ref[PAIRS:]}
    loss = trainer._compute_loss(model_of(token_logps(tokens, logits, mask)), batch, False)
    found = {name: values[0] for name, values in trainer._metrics["train"].items() if name.startswith(("rewards", "logps"))}
    return {"loss": float(loss), **found}


def conservative_dpo(beta, label_smoothing):
    """TRL 1.16 has label smoothing in CPO only; on log-ratios that is conservative DPO."""
    tokens, logits, mask, ref = inputs()
    trainer = stand_in(CPOTrainer, alpha=0.0, beta=beta, loss_type="sigmoid")
    trainer.label_smoothing = label_smoothing
    ratios = token_logps(tokens, logits, mask).sum(-1) - ref
    return {"loss": float(trainer.cpo_loss(ratios[:PAIRS], ratios[PAIRS:])[0].mean())}


def concatenated(trainer):
    """(chosen sums or means, rejected, NLL) of `trainer`'s own forward pass over the stored logits."""
    tokens, logits, mask, _ = inputs()
    labels = torch.where(mask, tokens, -100)
    inside = torch.arange(WIDTH) <= mask.sum(-1, keepdim=True)  # prompt and completion, no padding
    batch = {}
    for name, rows in (("chosen", slice(0, PAIRS)), ("rejected", slice(PAIRS, None))):
        batch |= {f"{name}_input_ids": tokens[rows], f"{name}_labels": labels[rows], f"{name}_attention_mask": inside[rows].long()}
    chosen, rejected, _, _, nll = trainer.concatenated_forward(lambda *_, **__: types.SimpleNamespace(logits=logits), batch)
    return chosen, rejected, nll


def simpo(beta, gamma):
    trainer = stand_in(CPOTrainer, alpha=0.0, cpo_alpha=0.0, beta=beta, simpo_gamma=gamma, loss_type="simpo")
    chosen, rejected, _ = concatenated(trainer)
    losses, chosen_rewards, rejected_rewards = trainer.cpo_loss(chosen, rejected)
    return {"loss": float(losses.mean()), "rewards/chosen": float(chosen_rewards.mean()), "rewards/rejected": float(rejected_rewards.mean())}


def orpo(beta):
    trainer = stand_in(ORPOTrainer, beta=beta)
    chosen, rejected, nll = concatenated(trainer)
    losses, _, _, _, log_odds = trainer.odds_ratio_loss(chosen, rejected)
    return {"loss": float(nll - losses.mean()), "nll": float(nll), "log_odds": float(log_odds)}


def kto(beta, desirable, undesirable):
    """The first PAIRS rows are desirable; each row's unrelated completion has the log-probabilities of the row before it."""
    tokens, logits, mask, ref = inputs()
    labels = torch.arange(2 * PAIRS) < PAIRS
    logps = token_logps(tokens, logits, mask)
    own, unrelated = model_of(logps), model_of(logps.roll(1, 0))

    def model(labels=None, input_ids=None, **_):
        return (unrelated if bool((input_ids < 0).all()) else own)(labels)

    model.training = True
    trainer = stand_in(KTOTrainer, beta=beta, loss_type="kto", calculate_KL=True, desirable_weight=desirable, undesirable_weight=undesirable)
    width = {"attention_mask": torch.ones_like(tokens), "completion_mask": mask.long()}
    batch = {"input_ids": tokens, **width, "KL_input_ids": -1 - tokens, **{f"KL_{name}": value for name, value in width.items()}}
    # A reference for the unrelated completions that is low enough for a baseline above 0.
    batch |= {"label": labels, "ref_logps": ref, "ref_KL_logps": logps.roll(1, 0).sum(-1) - 0.7}
    loss = trainer._compute_loss(model, batch, False)
    found = {name: values[0] for name, values in trainer._metrics["train"].items() if name.startswith(("rewards", "logps", "kl"))}
    return {"loss": float(loss), **found}


def main() -> None:
    tokens, logits, mask, ref = inputs()
    cases = {
        "sigmoid": ({"beta": 0.1}, dpo("sigmoid", 0.1)),
        "sigmoid_sharp": ({"beta": 0.7}, dpo("sigmoid", 0.7)),
        "conservative": ({"beta": 0.3, "label_smoothing": 0.1}, conservative_dpo(0.3, 0.1)),
        "robust": ({"beta": 0.3, "label_smoothing": 0.2}, dpo("robust", 0.3, 0.2)),
        "hinge": ({"beta": 0.2}, dpo("hinge", 0.2)),
        "ipo": ({"beta": 0.4}, dpo("ipo", 0.4)),
        "simpo": ({"beta": 2.0, "gamma": 1.0}, simpo(2.0, 1.0)),
        "orpo": ({"beta": 0.1}, orpo(0.1)),
        "kto": ({"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.3}, kto(0.1, 1.0, 1.3)),
    }
    golden = {
        "command": "python tests/make_golden_preference.py",
        "versions": {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "logps": token_logps(tokens, logits, mask).tolist(),
        "lengths": mask.sum(-1).tolist(),
        "ref_sums": ref.tolist(),
        "cases": {name: {"settings": settings, "expected": expected} for name, (settings, expected) in cases.items()},
    }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    print(f"{GOLDEN.name}: {len(cases)} cases, {golden['versions']}")


if __name__ == "__main__":
    main()
