"""Trains a SAELens SAE on given activations and saves it in SAELens's own layout, as its trainer leaves it.

    saelens_quality.py ROWS.npy topk|batchtopk|jumprelu D_SAE K BATCH STEPS RATE FOLDER
"""

import argparse

import numpy as np
import torch

from peer_common import emit


def main():
    """One training run."""
    import sae_lens
    from sae_lens import LoggingConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows")
    parser.add_argument("architecture", choices=["topk", "batchtopk", "jumprelu"])
    for name in ("d_sae", "k", "batch", "steps"):
        parser.add_argument(name, type=int)
    parser.add_argument("rate", type=float)
    parser.add_argument("folder")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = torch.from_numpy(np.load(args.rows))
    name = {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU"}[args.architecture]
    cfg_class, sae_class = (getattr(sae_lens, f"{name}TrainingSAE{end}") for end in ("Config", ""))
    own = {"k": args.k}
    if args.architecture == "jumprelu":
        own = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(args.k), "l0_coefficient": 1.0, "jumprelu_bandwidth": 1.0,
               "jumprelu_init_threshold": 0.1}  # fmt: skip
    sae = sae_class(
        cfg_class(
            d_in=rows.shape[1], d_sae=args.d_sae, dtype="float32", device="cpu", normalize_activations="expected_average_only_in", **own
        )
    )

    def batches():
        while True:
            order = torch.randperm(len(rows))
            for start in range(0, len(rows) - args.batch + 1, args.batch):
                yield rows[order[start : start + args.batch]]

    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=args.batch * args.steps,
        device="cpu",
        autocast=False,
        lr=args.rate,
        lr_end=args.rate / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=50,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=args.steps // 5,
        n_restart_cycles=1,
        train_batch_size_samples=args.batch,
        dead_feature_window=500,
        feature_sampling_window=1000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trained = SAETrainer(cfg=config, sae=sae, data_provider=iter(batches())).fit()
    trained.save_inference_model(args.folder)
    emit("sae-lens", 1.0, "runs", 0.0)


if __name__ == "__main__":
    main()
