"""
Ranges of the numbers that TRL and transformers take as they come.

Out of range some of them stop a run after the model is loaded, with the words of torch; others end
it at once or change what it does, without a word.
"""

from ogpsa_trl.cli.values import Range

_COUNT = Range("an integer of at least 1", lambda value: value >= 1)
_NOT_NEGATIVE = Range("a number of at least 0", lambda value: value >= 0)
_POSITIVE = Range("a number above 0", lambda value: value > 0)
_SHARE = Range("a number from 0 to 1", lambda value: 0 <= value <= 1)
_BELOW_ONE = Range("a number of at least 0 and below 1", lambda value: 0 <= value < 1)
_SEED = Range("an integer from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32)
_WORKERS = Range("an integer of at least 0", lambda value: value >= 0)
_LENGTH = Range(
    "an integer of at least 2 tokens, of which the first predicts the second, or unset",
    lambda value: value >= 2,
)
_CADENCE = Range(
    "a number of steps above 0, or a share of all steps below 1", lambda value: value > 0
)
_STEPS = Range(
    "at least 1, or -1 for as many steps as `num_train_epochs` makes",
    lambda value: value >= 1 or value == -1,
)
_TIMEOUT = Range("a number of seconds from 1 to 10 million", lambda value: 1 <= value <= 10**7)

TRAINING_RANGES: dict[str, Range] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size", "per_device_eval_batch_size",
            "gradient_accumulation_steps", "eval_accumulation_steps", "dataset_num_proc",
            "dataloader_prefetch_factor", "torch_empty_cache_steps", "save_total_limit",
            "ddp_bucket_cap_mb", "pad_to_multiple_of", "precompute_ref_batch_size",
            "ref_model_sync_steps", "lora_r", "lora_alpha",
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps",
            "neftune_noise_alpha", "eval_delay", "router_aux_loss_coef",
        ),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(("num_train_epochs", "beta", "discopop_tau", "test_split_size"), _POSITIVE),
    **dict.fromkeys(
        ("label_smoothing", "label_smoothing_factor", "ld_alpha", "ref_model_mixup_alpha"), _SHARE
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), _BELOW_ONE),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), _CADENCE),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    "dataloader_num_workers": _WORKERS,
    "max_length": _LENGTH,
    "max_steps": _STEPS,
    "ddp_timeout": _TIMEOUT,
}  # fmt: skip
