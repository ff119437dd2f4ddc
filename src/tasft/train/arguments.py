"""Which of transformers' `TrainingArguments` are heeded, and what is said of the others."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from transformers import TrainingArguments
from transformers import __version__ as transformers_version

from tasft.core.errors import UserError

_NO_PREDICTIONS = "an evaluation here gives losses and no predictions"

REFUSED = {
    "label_smoothing_factor": "the two terms of the loss are computed from the rows as they are",
    "average_tokens_across_devices": "each term is always divided by the count of all processes",
    "bf16_full_eval": "what is evaluated is compared with the model at step 0, in its own precision; load it in bf16",
    "fp16_full_eval": "what is evaluated is compared with the model at step 0, in its own precision; load it in fp16",
    "torch_compile": "the output head is replaced within each step, which a compiled model does not see",
    "use_cache": "training reads each row once and keeps no cache",
    "auto_find_batch_size": "a smaller micro-batch would change what a step holds: lower per_device_train_batch_size "
    "and raise gradient_accumulation_steps by the same factor",
    "parallelism_config": "rows are not split between processes, nor is a layer: use fsdp or deepspeed",
    "train_sampling_strategy": "which rows a step holds is said by sampling and avoid_per_step",
    "length_column_name": "it belongs to train_sampling_strategy; within a step rows always stand by length",
    "dataloader_drop_last": "an epoch is one pass over all rows to imitate",
    "dataloader_in_order": "micro-batches out of order would change what a step holds",
    "label_names": "rows have labels of their own",
    "include_for_metrics": _NO_PREDICTIONS,
    "batch_eval_metrics": _NO_PREDICTIONS,
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
}
"""Taken by transformers' Trainer, but of no effect here or of a wrong one; each with the reason."""

HEEDED = frozenset(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile_backend
    torch_compile_mode use_liger_kernel liger_kernel_config neftune_noise_alpha torch_empty_cache_steps
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
    per_device_eval_batch_size prediction_loss_only eval_on_start eval_accumulation_steps save_only_model
    save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token
    hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
    metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint
    full_determinism seed data_seed use_cpu accelerator_config dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    remove_unused_columns ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics do_train do_eval do_predict
    resume_from_checkpoint local_rank
    """.split()  # noqa: SIM905
)
"""Those that mean here what transformers says of them."""

_ACCELERATOR = {
    "split_batches": "a batch would be shared between processes, so that a step holds fewer rows",
    "dispatch_batches": "each process takes its own rows",
    "even_batches": "rows in which nothing counts fill the last batch up",
    "use_seedable_sampler": "the order of rows is a function of seed and epoch alone",
}

_PARAMETERS = {
    "compute_metrics": _NO_PREDICTIONS,
    "preprocess_logits_for_metrics": _NO_PREDICTIONS,
    "compute_loss_func": "the loss is that of TA-SFT; see penalty and normalization",
    "data_collator": "rows are laid side by side by tasft.train.collate",
    "model_init": "give the model itself: the penalty looks at it at step 0",
}


def refuse_unheeded(args: TrainingArguments, parameters: Mapping[str, Any]) -> None:
    """Refuse what transformers' Trainer takes and ours would not heed.

    Args:
        args: As the trainer got them.
        parameters: Others that the trainer got, by their names.

    Raises:
        UserError: Names each argument that is set to something else than its default, with the reason.
    """
    faults = []
    for field in fields(TrainingArguments):
        if field.name in HEEDED or getattr(args, field.name) == _default(field):
            continue
        reason = REFUSED.get(field.name, f"transformers {transformers_version} has it and this tasft does not know it")
        faults.append(f"{field.name}={getattr(args, field.name)!r:.60} has no effect here: {reason}; leave it out")
    if getattr(args, "padding_free", False) and args.include_num_input_tokens_seen == "non_padding":
        faults.append(
            "include_num_input_tokens_seen='non_padding' counts masks, which rows end to end have none of; use all"
        )
    usual = type(args.accelerator_config)()
    for name, reason in _ACCELERATOR.items():
        value = getattr(args.accelerator_config, name)
        if value != getattr(usual, name):
            faults.append(f"accelerator_config: {name}={value!r:.60} has no effect here: {reason}; leave it out")
    for name, reason in _PARAMETERS.items():
        if parameters.get(name) is not None:
            faults.append(f"{name} has no effect here: {reason}; leave it out")
    if faults:
        raise UserError(faults)


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
