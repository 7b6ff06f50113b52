"""SAELens's TopK SAE: seconds of one training step, or of one encoding, of a batch of random activations.

    saelens_sae.py train|encode D_IN D_SAE K BATCH REPEATS

Training is `SAETrainer.step` (forward, backward, clipping, Adam), in the faster of its dense and sparse variants.
"""

import json
import sys
import time

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from sae_lens.training.sae_trainer import SAETrainer


def seconds(call, repeats):
    """Seconds of each call, after two that warm up."""
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times[2:]


def trainer(d_in, d_sae, k, batch, sparse):
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, use_sparse_activations=sparse))
    cfg = SAETrainerConfig(
        total_training_samples=1_000_000,
        device="cpu",
        autocast=False,
        lr=2e-4,
        lr_end=2e-5,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=batch,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
    )
    return SAETrainer(cfg, sae, data_provider=iter(()))


def main(mode, *numbers):
    d_in, d_sae, k, batch, repeats = map(int, numbers)
    torch.manual_seed(0)
    x = torch.randn(batch, d_in)
    if mode == "encode":
        sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=k))
        with torch.no_grad():
            times = {"dense": seconds(lambda: sae.encode(x), repeats)}
    else:
        trainers = {name: trainer(d_in, d_sae, k, batch, name == "sparse") for name in ("dense", "sparse")}
        times = {name: seconds(lambda t=t: t.step(x), repeats) for name, t in trainers.items()}
    best = min(times, key=lambda name: min(times[name]))
    print(json.dumps({"value": batch / min(times[best]), "variant": best, "seconds": times[best]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
