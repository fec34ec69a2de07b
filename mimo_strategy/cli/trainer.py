"""The verbs of Lightning's Trainer."""

from functools import partial

HELP = """usage: mimo {verb} --config FILE [--config FILE ...] [--KEY=VALUE ...]

{what}

  --config FILE                                        YAML with what follows; a later one overrides an earlier one
  --print_config                                       print all that would be used, and stop; FILE may be its output
  --seed_everything=1                                  weights and data order

Trainer, as in Lightning:
  --trainer.devices=4 --trainer.num_nodes=2            ranks per node, and nodes
  --trainer.accelerator=cpu                            or gpu; the default takes what is there
  --trainer.precision=bf16-mixed                       or 32-true, bf16-true, 16-mixed
  --trainer.max_steps=100 --trainer.max_epochs=3       steps are optimizer steps
  --trainer.gradient_clip_val=1.0
  --trainer.callbacks+=LearningRateMonitor             adds a callback

Layout of each module; `mimo layout` draws and checks it:
  --trainer.strategy.modules.images.dp=4               tp, cp, dp, pp
  --trainer.strategy.modules.language.tp=4             ep, etp, rank_offset, num_ranks
  --trainer.strategy.num_microbatches=2                microbatches of a step

Model and data, by class; yours are given as package.Class:
  --model=NemotronVLM --model.language.hidden_size=64   and others: --model.help=NemotronVLM
  --data=DigitsDataModule --data.batch_size=64         samples of a step: --data.help=DigitsDataModule
{more}
All options: mimo {verb} --help_all      Ready configurations: examples/configs      Guide: docs/command-line.md"""

_CHECKPOINT = "  --ckpt_path=runs/NAME/last.ckpt                      {use}\n"

_VERBS = {
    "fit": ("Train a model.", _CHECKPOINT.format(use="go on with a run; `last` finds the newest whole one")),
    "validate": ("Compute the loss on the held-out samples.", _CHECKPOINT.format(use="the weights to use")),
    "test": ("Generate answers for the held-out samples and measure them.", _CHECKPOINT.format(use="the weights")),
    "predict": (
        "Generate answers and write them, with their images, to predictions/ in the run's folder.",
        "  --model.max_new_tokens=20 --model.sampling.top_p=0.9\n" + _CHECKPOINT.format(use="the weights to use"),
    ),
}


def run(verb: str, arguments: list[str]) -> int:
    """Parse ``arguments``, make model, data and Trainer, and call the Trainer's ``verb``."""
    if {"-h", "--help"} & set(arguments) or not arguments:
        what, more = _VERBS[verb]
        print(HELP.format(verb=verb, what=what, more="\nCheckpoint:\n" + more))
        return 0
    from mimo_strategy.cli.lightning_cli import MimoCLI

    MimoCLI(verb, ["--help" if argument == "--help_all" else argument for argument in arguments])
    return 0


fit = partial(run, "fit")
validate = partial(run, "validate")
test = partial(run, "test")
predict = partial(run, "predict")
