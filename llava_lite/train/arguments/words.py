"""Turn the flags of other programs, and guesses, into what a command here calls the same thing."""

import difflib

# What only `train` and `plan` have: what to write -> how it is called elsewhere: LLaVA, transformers, LLaMA-Factory,
# ms-swift, axolotl, a guess.
OF_TRAINING = {
    "--num_train_epochs": "epochs epoch num_epochs n_epochs max_epochs nb_epochs total_epochs train_epochs",
    "--max_steps": "steps num_steps max_train_steps total_steps train_steps iterations iters num_iterations",
    "--learning_rate": "lr learning_rates base_lr peak_lr init_lr",
    "--mm_vision_tower_lr": "vision_lr vision_tower_lr vit_lr",
    "--mm_projector_lr": "projector_lr connector_lr adapter_lr aligner_lr mm_lr",
    "--gradient_accumulation_steps": "accumulation accumulate accum grad_accum gradient_accumulation "
    "grad_accumulation accumulation_steps grad_accum_steps gradient_accumulation_step accumulate_grad_batches "
    "accum_iter update_freq",
    "--lr_scheduler_type": "scheduler lr_scheduler lr_schedule schedule lr_decay_style lr_policy",
    "--warmup_steps (below 1 a fraction of all steps)": "warmup warm_up num_warmup_steps warmup_iters lr_warmup_iters "
    "warmup_proportion",
    "--weight_decay": "wd decay weight_decays",
    "--max_grad_norm": "grad_clip clip_grad gradient_clipping max_norm clip_grad_norm clip",
    "--optim": "optimizer opt optim_type",
    "--eval_data_path": "eval_data eval_dataset eval_file val_data val_dataset val_file validation_data "
    "validation_file test_data test_file",
    "--eval_split": "val_size val_split test_size eval_size eval_ratio val_ratio split_dataset_ratio val_set_size",
    "--mm_projector_type": "projector_type connector_type mm_connector_type",
    "--resume_from_checkpoint": "resume resume_from resume_path resume_training continue restart ckpt_resume "
    "load_checkpoint",
    "--tuning projector, full, lora or moe": "stage method mode train_type tuning_type finetuning_type finetune_type "
    "sft_type tune",
    "--tuning projector": "pretrain only_projector train_projector tune_projector freeze_llm freeze_language_model "
    "freeze_lm freeze_llm_model tune_mm_projector tune_adapter",
    "--tuning lora": "lora use_lora peft use_peft use_peft_lora lora_tuning",
    "--tuning lora --bits 4": "qlora use_qlora",
    "--lora_r": "rank lora_rank r lora_dim",
    "--lora_alpha": "alpha lora_scale",
    "nothing: LoRA is on every linear layer of the language model": "lora_target lora_targets lora_target_modules "
    "target_modules lora_modules",
    "nothing: the tokenizer is the one beside the model": "tokenizer tokenizer_path tokenizer_name "
    "tokenizer_name_or_path",
    "--tuning moe": "moe use_moe enable_moe",
    "--num_experts": "experts n_experts num_local_experts expert_num",
    "--top_k_experts": "top_k topk k num_experts_per_tok moe_top_k",
    "--router_aux_loss_coef": "aux_loss_coef moe_aux_loss_coef balance_loss_coef load_balancing_loss aux_loss_weight",
    "nothing: the vision tower stays frozen without --unfreeze_mm_vision_tower True": "freeze_vit freeze_vision_tower "
    "freeze_vision_encoder freeze_tower freeze_vision",
    "--unfreeze_mm_vision_tower True": "unfreeze_vision_tower train_vision_tower tune_vision_tower unfreeze_vit "
    "train_vit unfreeze_vision_encoder tune_vision",
    "--deepspeed zero2 or zero3, or a DeepSpeed JSON": "zero zero_stage ds ds_config deepspeed_config deepspeed_stage",
    "--attn_implementation": "flash flash_attn flash_attention use_flash_attn use_flash_attention "
    "use_flash_attention_2 attn attention",
    "--gradient_checkpointing auto": "checkpointing activation_checkpoint grad_checkpointing grad_checkpoint "
    "recompute use_gradient_checkpointing",
    "--report_to wandb, or tensorboard": "wandb use_wandb tensorboard log_with logger tracker use_tensorboard",
    "--logging_steps": "log_every log_interval log_steps logging_step log_freq print_freq",
    "--save_steps": "save_every save_interval save_step save_freq checkpoint_every checkpoint_interval",
    "--eval_steps": "eval_every eval_interval eval_step val_interval evaluation_steps",
    "--save_total_limit": "keep_last save_total save_top_k max_checkpoints keep_checkpoints",
    "--run_name": "name run exp_name experiment experiment_name job_name wandb_run_name",
    "--packing samples or tokens": "pack use_packing pack_samples packing_length",
    "--new_tokens": "add_tokens new_special_tokens additional_special_tokens special_tokens extra_tokens "
    "add_special_tokens",
}
# What a flag of several commands is about -> the same.
MEANINGS = {
    "model": "model models model_path model_name model_name_or_path model_id model_dir base_model llm language_model "
    "pretrained_model pretrained_model_name_or_path checkpoint checkpoint_path ckpt ckpt_path ckpt_dir source input",
    "base": "base model_base base_path base_model base_model_name_or_path",
    "tower": "tower vision_tower image_tower mm_vision_tower vision_encoder vision_model visual_encoder vit clip",
    "data": "data dataset datasets data_file data_files data_dir dataset_path dataset_name train_data train_dataset "
    "train_file train_files train_path data_path json json_path annotation annotations ann_path question_file",
    "images": "image images image_dir images_dir image_path image_paths image_root image_root_dir image_folder "
    "image_file image_files images_folder img img_dir img_path img_folder picture pictures media_dir data_root",
    "output": "output out output_dir output_path output_folder outdir out_dir save save_dir save_path save_to target "
    "dest destination export_dir work_dir ckpt_out save_model_path answers_file",
    "template": "template version conv_mode conv_template conv_version chat_template prompt_template prompt_format "
    "prompt_style",
    "length": "max_length max_len max_seq_length max_seq_len max_tokens_per_sample seq_len seq_length sequence_length "
    "sequence_len cutoff_len context_length block_size model_max_length",
    "new_tokens": "max_tokens max_new_tokens max_length num_tokens new_tokens length n_predict",
    "quant4": "load_4bit load_in_4bit four_bit bits_4 int4 q4",
    "quant8": "load_8bit load_in_8bit eight_bit bits_8 int8 q8",
    "dtype": "dtype torch_dtype precision fp32 half",
    "workers": "workers num_workers num_proc dataloader_workers preprocessing_num_workers dataset_num_proc "
    "dataloader_num_workers",
    "batch": "batch batch_size bs train_batch_size micro_batch_size micro_train_batch_size per_device_batch_size "
    "batch_size_per_device batch_size_per_gpu mbs",
    "eval_batch": "eval_batch_size val_batch_size test_batch_size",
    "push": "push upload push_to_hub repo repo_id hub hub_id hub_model_id",
    "question": "question query prompt text q ask",
    "projector": "projector mm_projector connector pretrained_projector projector_path pretrain_projector "
    "pretrain_adapter adapter adapter_path adapter_name_or_path mm_projector_path",
    "devices": "gpus gpu num_gpus n_gpus n_gpu nproc nproc_per_node num_processes devices gpu_ids "
    "cuda_visible_devices",
    "device": "device cpu use_cuda cuda",
    "aspect": "aspect_ratio image_aspect pad anyres",
    **OF_TRAINING,
}
_MODEL_FLAG = "--model_name_or_path"
# Command -> what a flag is about -> what to write.
OURS = {
    "train": {
        "model": _MODEL_FLAG,
        "tower": "--vision_tower",
        "data": "--data_path",
        "images": "--image_folder",
        "output": "--output_dir",
        "template": "--version",
        "length": "--model_max_length",
        "quant4": "--bits 4 --tuning lora",
        "quant8": "--bits 8 --tuning lora",
        "dtype": "--bf16 True or --fp16 True",
        "workers": "--dataloader_num_workers",
        "push": "--push_to_hub True --hub_model_id USER/NAME",
        "batch": "--per_device_train_batch_size",
        "eval_batch": "--per_device_eval_batch_size",
        "projector": "--pretrain_mm_mlp_adapter",
        "devices": "it for the launcher: deepspeed --num_gpus N --module llava_lite.train.train ...",
        "device": "--use_cpu True for the CPU; a GPU is used where there is one",
        "aspect": "--image_aspect_ratio square, pad or anyres",
        **{ours: ours for ours in OF_TRAINING},
    },
    "check": {
        "model": _MODEL_FLAG,
        "tower": "--vision_tower",
        "data": "--data_path",
        "images": "--image_folder",
        "output": "--bad_records_file",
        "template": "--version",
        "length": "--model_max_length",
        "workers": "--num_workers",
        "aspect": "--image_aspect_ratio",
    },
    "data": {
        "data": "the file or directory to read as the first word, llava-lite data convert IN OUT.json",
        "output": "the file to write as the second word, llava-lite data convert IN OUT.json",
        "images": "--image_folder",
    },
    "chat": {
        "base": "--model-base",
        "model": "the model as the first word, llava-lite chat MODEL",
        "images": "--image-file",
        "template": "--conv-mode",
        "new_tokens": "--max-new-tokens",
        "quant4": "--load-4bit",
        "quant8": "--load-8bit",
        "question": "it after `USER:` when the chat has begun",
    },
    "serve": {
        "base": "--model-base",
        "model": "the model as the first word, llava-lite serve MODEL",
        "template": "--conv-mode",
        "new_tokens": "--max-new-tokens",
        "quant4": "--load-4bit",
        "quant8": "--load-8bit",
        "batch": "--max-batch",
    },
    "demo": {
        "base": "--model-base",
        "model": "the model as the first word, llava-lite demo MODEL",
        "template": "--conv-mode",
        "new_tokens": "--max-new-tokens",
        "quant4": "--load-4bit",
        "quant8": "--load-8bit",
        "images": "nothing: images are added on the page",
    },
    "convert": {
        "model": "the model as the first word, llava-lite convert SOURCE TARGET",
        "output": "the new directory as the second word, llava-lite convert SOURCE TARGET",
        "base": "a merged model as the source; llava-lite merge makes one",
        "dtype": "--dtype",
        "push": "--push-to-hub",
    },
    "merge": {
        "base": "--model-base",
        "model": "--model-path, or the first word of llava-lite merge SOURCE TARGET",
        "projector": "--model-path, or the first word of llava-lite merge SOURCE TARGET",
        "output": "--save-model-path, or the second word of llava-lite merge SOURCE TARGET",
        "dtype": "--dtype",
        "push": "--push-to-hub",
    },
    "push": {
        "model": "the directory as the first word, llava-lite push DIRECTORY USER/NAME",
        "output": "the directory as the first word, llava-lite push DIRECTORY USER/NAME",
        "push": "the repository as the second word, llava-lite push DIRECTORY USER/NAME",
        "base": "--base",
        "tower": "--tower",
    },
    "eval": {
        "base": "--model-base",
        "model": "--model-path",
        "images": "--image-file",
        "question": "--query",
        "template": "--conv-mode",
        "new_tokens": "--max_new_tokens",
    },
    "flagperf": {
        "data": "the data directory as the first word, llava-lite flagperf DATA_DIR CONFIG",
        "devices": "--num_chips",
        "output": "--json",
    },
    "benchmark": {
        "base": "--model-base",
        "model": "--model",
        "data": "--data",
        "images": "--data, the directory of the benchmark with its images",
        "output": "--out",
        "template": "--conv-mode",
        "new_tokens": "--max-new-tokens",
        "batch": "--batch-size",
        "eval_batch": "--batch-size",
        "devices": "it for the launcher: torchrun --nproc_per_node N -m llava_lite.cli eval ...",
        "quant4": "--load-4bit",
        "quant8": "--load-8bit",
    },
    "report": {
        "model": "the directory of the run as the first word, llava-lite report RUN_DIR",
        "output": "--out",
    },
    "answer": {
        "base": "--model-base",
        "model": "the model as the first word, llava-lite answer MODEL QUESTIONS.jsonl OUT.jsonl",
        "data": "the file of questions as the second word, llava-lite answer MODEL QUESTIONS.jsonl OUT.jsonl",
        "images": "--image-folder",
        "output": "the file of answers as the third word, llava-lite answer MODEL QUESTIONS.jsonl OUT.jsonl",
        "template": "--conv-mode",
        "new_tokens": "--max-new-tokens",
        "batch": "--batch-size",
        "eval_batch": "--batch-size",
        "devices": "it for the launcher: torchrun --nproc_per_node N -m llava_lite.cli answer ...",
        "quant4": "--load-4bit",
        "quant8": "--load-8bit",
    },
}
OURS["plan"] = OURS["train"] | {
    "devices": "--num_devices",
    "device": "nothing: a plan needs no device",
}


def bare(flag: str) -> str:
    """Return the name of a flag as in the tables: --Model-Path=x is model_path."""
    return flag.lstrip("-").partition("=")[0].replace("-", "_").lower()


def meant_by(command: str, flag: str, known=()) -> str | None:
    """Return what to write in place of a flag that a command does not have; None if nothing is similar.

    known: names of the flags that the command has. A flag of other programs comes before a similar spelling.
    """
    name, spelled = bare(flag), {bare(one): one for one in known}
    for meaning, ours in OURS.get(command, {}).items():
        is_here = not ours.startswith("--") or not spelled or bare(ours.split()[0].rstrip(",")) in spelled
        if name in MEANINGS[meaning].split() and is_here:
            return ours
    near = difflib.get_close_matches(name, spelled, n=1)
    return spelled[near[0]] if near else None


def unknown_flags(command: str, flags, known) -> str:
    """Return the message for flags that a command does not have, each with what to write instead."""
    sentences = []
    for flag in dict.fromkeys(flag.partition("=")[0] for flag in flags):
        meant = meant_by(command, flag, known)
        sentences.append(f"unknown flag {flag}" + (f": write {meant}." if meant else "."))
    return " ".join(sentences)


def words_left(command: str, words) -> str:
    """Return the message for words that belong to no flag; a flag with one dash is an unknown flag."""
    flags = [word for word in words if word.startswith("-") and not word.lstrip("-")[:1].isdigit()]
    if flags:
        return unknown_flags(command, flags, ())
    return f"{' '.join(map(repr, words))} belongs to no flag. Put quotes around a value with spaces."
