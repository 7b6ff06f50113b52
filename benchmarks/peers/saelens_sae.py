"""SAELens's TopK SAE: activations a second of its training step, or of its encode, fp32.

    saelens_sae.py train|encode D_IN D_SAE K BATCH REPEATS
"""

import argparse

import torch

from peer_common import emit, timed


def main():
    """Times the mode on one batch of random activations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["train", "encode"])
    for name in ("d_in", "d_sae", "k", "batch", "repeats"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = torch.randn(args.batch, args.d_in)
    call = (train if args.mode == "train" else encode)(args, rows)
    compile_s, best, middle = timed(call, args.repeats)
    emit("sae-lens", args.batch / best, "activations/s", compile_s, seconds=middle)


def encode(args, rows):
    """A call of TopKSAE.encode, which gives dense latents."""
    from sae_lens import TopKSAE, TopKSAEConfig

    sae = TopKSAE(TopKSAEConfig(d_in=args.d_in, d_sae=args.d_sae, k=args.k, dtype="float32", device="cpu"))
    torch.nn.init.kaiming_uniform_(sae.W_enc.data)

    def call():
        with torch.inference_mode():
            assert sae.encode(rows).shape == (args.batch, args.d_sae)

    return call


def train(args, rows):
    """A call of the trainer's own step: forward, auxiliary loss, backward, clipping, Adam."""
    from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=args.d_in, d_sae=args.d_sae, k=args.k, dtype="float32", device="cpu"))
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=args.batch * (args.repeats + 10),
        device="cpu",
        autocast=False,
        lr=3e-4,
        lr_end=3e-5,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=args.batch,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))
    return lambda: trainer._train_step(sae=sae, sae_in=rows)


if __name__ == "__main__":
    main()
