"""A SAELens SAE: activations a second of its training step, or of its encode, fp32.

    saelens_sae.py train|encode topk|batchtopk|jumprelu D_IN D_SAE K BATCH REPEATS
"""

import argparse
import resource

import torch

from peer_common import emit, timed


def main():
    """Times the mode on one batch of random activations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["train", "encode"])
    parser.add_argument("architecture", choices=["topk", "batchtopk", "jumprelu"])
    for name in ("d_in", "d_sae", "k", "batch", "repeats"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = torch.randn(args.batch, args.d_in)
    call = (train if args.mode == "train" else encode)(args, rows)
    compile_s, best, middle = timed(call, args.repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    emit("sae-lens", args.batch / best, "activations/s", compile_s, seconds=middle, peak_gib=peak)


def encode(args, rows):
    """A call of encode, which gives dense latents; a BatchTopK SAE is a JumpReLU one once it is trained."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig

    common = {"d_in": args.d_in, "d_sae": args.d_sae, "dtype": "float32", "device": "cpu"}
    if args.architecture == "topk":
        sae = TopKSAE(TopKSAEConfig(**common, k=args.k))
    else:
        sae = JumpReLUSAE(JumpReLUSAEConfig(**common))
        sae.threshold.data.fill_(0.01)
    torch.nn.init.kaiming_uniform_(sae.W_enc.data)

    def call():
        with torch.inference_mode():
            assert sae.encode(rows).shape == (args.batch, args.d_sae)

    return call


def train(args, rows):
    """A call of the trainer's own step: forward, auxiliary loss, backward, clipping, Adam."""
    import sae_lens
    from sae_lens import LoggingConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    name = {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU"}[args.architecture]
    cfg_class, sae_class = (getattr(sae_lens, f"{name}TrainingSAE{end}") for end in ("Config", ""))
    own = {} if args.architecture == "jumprelu" else {"k": args.k}
    sae = sae_class(cfg_class(d_in=args.d_in, d_sae=args.d_sae, dtype="float32", device="cpu", **own))
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
