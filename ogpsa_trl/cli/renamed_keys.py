"""
Keys that there were once: what they are called now, and which are gone.

The nearest key by its spelling is seldom the one that has taken over: for `torch_dtype` it is
`torch_compile`.

Source: `TrainingArguments` of transformers 3 to 5, `SFTConfig`, `DPOConfig`, `ModelConfig` and
`ScriptArguments` of TRL 0.7 to 1.16.
"""

from collections.abc import Collection

# A key, or a key with its value.
_SUCCESSORS = {
    # transformers
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "evaluate_during_training": "eval_strategy: steps",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps: SHARE",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "adafactor": "optim: adafactor",
    "include_inputs_for_metrics": "include_for_metrics: [inputs]",
    "include_tokens_per_second": "include_num_input_tokens_seen",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_organization": "hub_model_id: ORGANIZATION/MODEL",
    "push_to_hub_token": "hub_token",
    "torchdynamo": "torch_compile_backend",
    "xpu_backend": "ddp_backend",
    "fsdp_min_num_params": "fsdp_config: {min_num_params: NUMBER}",
    "fsdp_transformer_layer_cls_to_wrap": "fsdp_config: {transformer_layer_cls_to_wrap: [LAYER]}",
    "dispatch_batches": "accelerator_config: {dispatch_batches: true}",
    "split_batches": "accelerator_config: {split_batches: true}",
    # TRL
    "max_seq_length": "max_length",
    "max_completion_length": "max_length",
    "max_target_length": "max_length",
    "use_liger": "use_liger_kernel",
    "rpo_alpha": "loss_weights: [1.0, ALPHA]` and `loss_type: [sigmoid, sft]",
    "gradient_checkpointing_use_reentrant": "gradient_checkpointing_kwargs: {use_reentrant: true}",
    "use_flash_attention_2": "attn_implementation: flash_attention_2",
    "dataset_train_name": "dataset_train_split",
    "dataset_test_name": "dataset_test_split",
    # An argument of the trainers, never a key.
    "tokenizer": "tokenizer_name_or_path",
}

_OF_THE_MODEL = "It is that of the model"
_TORCH_DOES_IT = "Half precision is that of torch"
_NO_DEVICE = "This device, or what ran on it, is no longer told from others"
_NO_PADDING = "The trainer pads as its loss needs it"
_ONE_ADAPTER = "The adapter that is trained is the model's only one"
_REFERENCE = "The reference is the model before training"
_NO_STREAM = "Samples are packed as they are prepared"

# Why there is none any more, or what does it now, without a key.
_GONE = {
    # OGPSA
    "constraint": (
        "'inequality' had the same results as 'equality', which every step keeps. Remove the key"
    ),
    "compile_projection": "It saved a hundredth of a step. Remove the key: the run is the same",
    # transformers
    "overwrite_output_dir": "Nothing that is in the folder is deleted before training",
    "logging_dir": "TensorBoard reads the environment variable TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "Weights are always saved as safetensors",
    "fp16_backend": _TORCH_DOES_IT,
    "half_precision_backend": _TORCH_DOES_IT,
    "fp16_opt_level": "It was for apex, which is not used any more",
    "sharded_ddp": "It was for fairscale, which is not used any more; see docs/engines.md",
    "use_ipex": "It was for an extension of Intel's, the work of which torch does",
    "jit_mode_eval": "TorchScript is not used any more",
    "use_mps_device": "The device that is there is used",
    "tpu_num_cores": _NO_DEVICE,
    "tpu_metrics_debug": _NO_DEVICE,
    "mp_parameters": _NO_DEVICE,
    "ray_scope": "It was for searches of hyperparameters, which a run is not",
    "past_index": "It was for models that hand on states, such as TransformerXL",
    "use_legacy_prediction_loop": "There is one loop of evaluation",
    # TRL
    "tokenizer": _OF_THE_MODEL,
    "is_encoder_decoder": _OF_THE_MODEL,
    "max_prompt_length": "Prompt and completion are cut as one; filter prompts that are too long",
    "num_of_sequences": _NO_STREAM,
    "chars_per_token": _NO_STREAM,
    "dataset_batch_size": _NO_STREAM,
    "label_pad_token_id": _NO_PADDING,
    "padding_value": _NO_PADDING,
    "generate_during_eval": "Nothing is generated during training",
    "model_adapter_name": _ONE_ADAPTER,
    "ref_adapter_name": _ONE_ADAPTER,
    "ref_model_init_kwargs": _REFERENCE,
    "force_use_ref_model": _REFERENCE,
    "reference_free": "DPO has a reference always",
    "use_logits_to_keep": "The trainer knows which logits it needs",
    "use_num_logits_to_keep": "The trainer knows which logits it needs",
    "base_model_attribute_name": "The trainer finds it",
}


def answer_to(key: str, known: Collection[str]) -> str | None:
    """
    What to say of a key that was renamed or removed; `None`: it was not.

    Args:
        key: The key.
        known: The keys there are: no other is named.
    """
    successor = _SUCCESSORS.get(key)
    if successor is not None and successor.partition(":")[0] in known:
        return f"It is not called that any more: write `{successor}`."
    if key in _GONE:
        return f"There is no such key any more. {_GONE[key]}."
    return None
