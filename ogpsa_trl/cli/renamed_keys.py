"""
Keys that there were in the last two years: what they are called now, and which are gone.

The nearest key by its spelling is seldom the one that has taken over: for `torch_dtype` it is
`torch_compile`.

Source: `TrainingArguments` of transformers 4.40 to 5, and the configurations of TRL 0.9 to 1.16.
"""

# The key, or the key with its value, that has taken over.
RENAMED = {
    # OGPSA
    "replay_weight": "capability_weight",
    # transformers
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps: SHARE",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "adafactor": "optim: adafactor",
    "include_inputs_for_metrics": "include_for_metrics: [inputs]",
    "include_tokens_per_second": "include_num_input_tokens_seen",
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

# Why there is none any more, or what does it now, without a key.
REMOVED = {
    # OGPSA
    "constraint": (
        "'inequality' had the same results as 'equality', which every step keeps. Remove the key"
    ),
    "compile_projection": "It saved a hundredth of a step. Remove the key: the run is the same",
    # transformers
    "overwrite_output_dir": "Nothing that is in the folder is deleted before training",
    "logging_dir": "TensorBoard reads the environment variable TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "Weights are always saved as safetensors",
    "half_precision_backend": "Half precision is that of torch",
    # TRL
    "tokenizer": "It is that of the model",
    "is_encoder_decoder": "It is that of the model",
    "max_prompt_length": "Prompt and completion are cut as one; filter prompts that are too long",
    **dict.fromkeys(
        ("num_of_sequences", "chars_per_token", "dataset_batch_size"),
        "Samples are packed as they are prepared",
    ),
    **dict.fromkeys(
        ("label_pad_token_id", "padding_value"), "The trainer pads as its loss needs it"
    ),
    "generate_during_eval": "Nothing is generated during training",
    **dict.fromkeys(
        ("model_adapter_name", "ref_adapter_name"),
        "The adapter that is trained is the model's only one",
    ),
    **dict.fromkeys(
        ("ref_model_init_kwargs", "force_use_ref_model", "reference_free"),
        "The reference is the model before training",
    ),
    **dict.fromkeys(
        ("use_logits_to_keep", "use_num_logits_to_keep"),
        "The trainer knows which logits it needs",
    ),
}
