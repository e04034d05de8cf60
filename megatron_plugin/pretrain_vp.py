"""Megatron-LM's pretrain_gpt.py for vp models: copy this folder, put the checkout of Megatron-LM on PYTHONPATH, run it.

Use:
    PYTHONPATH=Megatron-LM torchrun --nproc-per-node 8 megatron_plugin/pretrain_vp.py \
        $(grep -v '^#' EXPORT/arguments-stock.txt) --load EXPORT --save RUN --finetune ...

What differs from pretrain_gpt.py: the model, the flags of the plugin, and where documents end.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pretrain_gpt  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import pretrain  # noqa: E402
from megatron.training.arguments import core_transformer_config_from_args  # noqa: E402
from model_provider import model_provider  # noqa: E402
from vp_megatron import VpConfig, VpModel, add_arguments  # noqa: E402


def vp_builder(args, pre_process, post_process, vp_stage=None, config=None, pg_collection=None):
    """A model of the run's arguments, as gpt_builder makes one."""
    config = config or core_transformer_config_from_args(args, config_class=VpConfig)
    return VpModel(
        config,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        rotary_base=args.rotary_base,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def datasets_provider(samples, vp_stage=None):
    """The data sets of pretrain_gpt, whose documents end at --eod-id."""
    build = pretrain_gpt.core_gpt_dataset_config_from_args

    def with_end(args):
        config = build(args)
        if args.eod_id is not None:
            config.tokenizer = EndsAt(config.tokenizer, args.eod_id)
        return config

    pretrain_gpt.core_gpt_dataset_config_from_args = with_end
    try:
        return pretrain_gpt.train_valid_test_datasets_provider(samples, vp_stage)
    finally:
        pretrain_gpt.core_gpt_dataset_config_from_args = build


datasets_provider.is_distributed = True


class EndsAt:
    """A tokenizer that answers another end of document; every other question goes to the one within."""

    def __init__(self, tokenizer, eod: int) -> None:
        self._tokenizer, self.eod = tokenizer, eod

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


if __name__ == "__main__":
    pretrain(
        datasets_provider,
        partial(model_provider, vp_builder),
        ModelType.encoder_or_decoder,
        pretrain_gpt.forward_step,
        args_defaults={"tokenizer_type": "NullTokenizer"},
        extra_args_provider=add_arguments,
    )
