"""Argument files for the two stacks that take an exported student: stock Megatron with the plugin, the public stack.

Place in the path: layout -> **megatron** -> Megatron's command line. Pure: a config in, flags and comments out.

Invariants: every figure comes from the student's config; what a flag cannot say stands in a comment.

Example:
    >>> stock_file(config).splitlines()[-1]
    '--dist-ckpt-strictness raise_all'

Source: megatron/training/arguments.py of Megatron-LM 0.16.1, and of vpareek2/vpMoE at b8a563c.
"""

from __future__ import annotations

from recipes.model.config import StudentConfig
from recipes.train.megatron_arguments import model_arguments
from recipes.train.run_files import Arguments, write_arguments

END_OF_DOCUMENT = 199999
STOCK_FILE, PUBLIC_FILE = "arguments-stock.txt", "arguments-public.txt"
_LOADING: Arguments = {
    "ckpt-format": "torch_dist",
    "no-load-optim": None,
    "no-load-rng": None,
    "dist-ckpt-strictness": "raise_all",
}
_NOT_PUBLIC = ("grape-m", "vocab-size")


def stock_arguments(config: StudentConfig) -> Arguments:
    """Flags of stock Megatron-Core and of the plugin."""
    return {**model_arguments(config.model_dump(mode="json")), "eod-id": str(END_OF_DOCUMENT), **_LOADING}


def public_arguments(config: StudentConfig) -> Arguments:
    """Flags of the public stack, which has its own names for learnable frequencies and for the tokenizer."""
    flags = dict(model_arguments(config.model_dump(mode="json")))
    for name in _NOT_PUBLIC:
        flags.pop(name, None)
    if config.attention == "tpa":
        flags["position-embedding-type"] = "grapem"
    # Layers differ, so each has keys of its own; the plugin says so by itself.
    return {**flags, "tokenizer-type": "O200kHarmonyTokenizer", "hetereogenous-dist-checkpoint": None, **_LOADING}


def stock_file(config: StudentConfig) -> str:
    """The argument file for stock Megatron-Core 0.16 to 0.19 with the plugin."""
    comments = [
        "stock Megatron-Core 0.16 to 0.19 with megatron_plugin/: run pretrain_vp.py in the place of pretrain_gpt.py",
        "add --load and the folder of this file; the weights start a run at step 0, without an optimizer state",
        f"NullTokenizer adds an id of its own to --vocab-size; --eod-id {END_OF_DOCUMENT} is where documents end",
        "tensor parallelism up to 2 (experts: --sequence-parallel --expert-tensor-parallel-size 1), expert parallelism",
    ]
    return write_arguments(dict(stock_arguments(config)), comments=comments)


def public_file(config: StudentConfig, *, folds_shared_bias: bool) -> str:
    """The argument file for the public stack."""
    comments = [
        "the public stack, vpareek2/vpMoE at b8a563c, folder vpmoe/Megatron-vpmoe: its own pretrain_gpt.py",
        "add --load and the folder of this file, and --optimizer normuon --synth-kd-data with their values",
    ]
    if config.attention == "tpa":
        comments += [
            "windowed layers attend across documents there, whatever mask they are given: the loss of packed documents",
            "is another (5.900 for four documents instead of 5.977); give each row one document, or take the plugin",
            "tensor parallelism of the factors b sums no gradients there: keep --tensor-model-parallel-size 1",
        ]
    if config.moe is not None and not folds_shared_bias:
        comments.append("this export is not for the public stack, which drops the shared expert's output bias")
    return write_arguments(dict(public_arguments(config)), comments=comments)
