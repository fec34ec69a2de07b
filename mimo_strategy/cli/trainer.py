"""The verbs of Lightning's Trainer."""

from functools import partial

HELP = """usage: mimo {verb} --config FILE [--config FILE ...] [--KEY=VALUE ...]

{what}

  --config FILE                             YAML of all that follows; a later one overrides
  --print_config                            print all settings and stop; FILE may be the output
  --seed_everything=1                       weights and the order of the data

Trainer, as in Lightning:
  --trainer.devices=4                       ranks per node; --trainer.num_nodes=2 nodes
  --trainer.accelerator=cpu                 or gpu; by default what is there
  --trainer.precision=bf16-mixed            or 32-true, bf16-true, 16-mixed
  --trainer.max_steps=100                   or --trainer.max_epochs=3
  --trainer.callbacks+=LearningRateMonitor  one more callback

Layout of each module, drawn and checked by `mimo layout`:
  --trainer.strategy.modules.images.dp=4    tp, dp, pp, rank_offset, num_ranks
  --trainer.strategy.modules.language.tp=4  and ep, etp for experts
  --trainer.strategy.num_microbatches=2     parts of a step batch

Model and data, by class; one of yours is package.Class:
  --model=NemotronVLM                       its options: --model.help=NemotronVLM
  --model.radio.image_height=512
  --data=DigitsDataModule                   its options: --data.help=DigitsDataModule
  --data.batch_size=64                      samples of a step, over all ranks

{checkpoint}

All options: mimo {verb} --help_all
Configurations to start from: examples/configs"""

_VERBS = {
    "fit": ("Train a model.", "go on with a run; `last` finds the newest"),
    "validate": ("Compute the loss on the held-out samples.", "weights to use"),
    "test": ("Generate answers for the held-out samples and compare them.", "weights to use"),
    "predict": ("Generate answers; write them and their images to predictions/ of the run.", "weights to use"),
}


def run(verb: str, arguments: list[str]) -> int:
    """Parse ``arguments``, make model, data and Trainer, and call the Trainer's ``verb``."""
    if {"-h", "--help"} & set(arguments) or not arguments:
        what, use = _VERBS[verb]
        print(HELP.format(verb=verb, what=what, checkpoint=f"  --ckpt_path=NAME.ckpt                     {use}"))
        return 0
    from mimo_strategy.cli.lightning_cli import MimoCLI

    MimoCLI(verb, ["--help" if argument == "--help_all" else argument for argument in arguments])
    return 0


fit = partial(run, "fit")
validate = partial(run, "validate")
test = partial(run, "test")
predict = partial(run, "predict")
