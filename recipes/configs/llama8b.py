"""Llama-3.1-8B-Instruct on UltraFeedback, the recipe of Marin's guide.

  python recipes/dpo.py --config=recipes/configs/llama8b.py --config.directory=/runs/llama8b

Weights in float32 with AdamW take 128 GB over all devices, the reference 16 GB: eight GPUs of 80
GB, or a v5p-16. One update is 128 pairs, however many devices share it.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """Every setting of a run that trains the weights; those of adapters are in docs/adapters.md."""
    # A file that starts from this one may change any setting; checks.py checks kinds.
    config = ml_collections.ConfigDict(type_safe=False)
    config.name = "llama8b"
    config.tags = ("dpo", "ultrafeedback", "llama3")
    config.directory = config_dict.placeholder(str)  # where the run keeps its files; give it
    config.seed = 0

    # Models: folders or hub ids (owner/name@revision). Their config.json decides the architecture.
    config.initialize_from_hf = "meta-llama/Llama-3.1-8B-Instruct"
    config.reference_model_path = config_dict.placeholder(str)  # unset: initialize_from_hf
    config.reference_is_hf = True  # False: reference_model_path is the directory of a run
    config.reference_mode = "resident"  # stays in memory; cached: computed once, then freed
    config.reference_cache = config_dict.placeholder(str)  # cached; unset: beside the directory
    config.tokenizer = config_dict.placeholder(str)  # unset: the one in initialize_from_hf
    config.chat_template = config_dict.placeholder(str)  # unset: the tokenizer's own; or a file

    # Data: files (a path, gs://, s3://, * for several), or a hub dataset
    # (owner/name:subset:split@revision). Several: dict(name=dict(path="…", weight=2.0), …).
    config.train_data = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"
    config.validation_split_fraction = 0.1  # of the prompts; None: only what validation names
    config.validation = dict()  # name="file or hub dataset"
    config.data = dict(
        layout=config_dict.placeholder(str),  # unset: recognised from the columns
        columns=dict(),  # our name="its name", where a dataset has other names
        scored_turns="assistant",  # of what follows the prompt; or last, all
        date=config_dict.placeholder(str),  # "2026-01-31", for templates that print today's
        # A special token after the last answer, for templates that write none: "<|im_end|>".
        end_of_turn=config_dict.placeholder(str),
        answers=2,  # of a ranked row of more: best and worst; docs/data.md
        over_length="drop",  # or cut_prompt, cut_answer
        max_malformed_fraction=0.01,
    )
    config.token_cache = "~/.cache/nnx-zoo/tokens"  # unset: tokenised at every start
    config.train_seq_len = 4096  # tokens of the prompt and either answer
    config.row_length = config_dict.placeholder(int)  # unset: what fills best
    config.per_device_parallelism = config_dict.placeholder(int)  # rows; unset: what memory allows
    config.min_pack_fill = 0.5

    config.loss = "sigmoid"  # docs/losses.md has others, and sums of several
    config.beta = 0.01
    config.label_smoothing = 0.0
    config.dpop_lambda = config_dict.placeholder(float)  # for dpop: 5.0

    config.train_batch_size = 128  # pairs per update
    config.num_train_steps = 2_000
    config.num_epochs = config_dict.placeholder(float)  # instead of num_train_steps
    config.trainable = config_dict.placeholder(str)  # unset: all weights; or those of these names
    config.optimizer = "adamw"  # or adamw8bit, lion, rmsprop, muon, adafactor
    config.learning_rate = 5e-7
    config.lr_schedule = "linear"
    config.warmup = 0.1  # a fraction of the steps, or steps
    config.cooldown = 0.1  # unset: decays over all the rest
    config.min_lr_ratio = 0.0
    config.weight_decay = 0.0
    config.max_grad_norm = 1.0
    config.ema_decay = config_dict.placeholder(float)  # 0.99: an average of the weights is exported
    config.nonfinite = "stop"  # at a NaN or infinite loss or gradient; skip: skips that update
    config.adam_beta1 = 0.9
    config.adam_beta2 = 0.95
    config.adam_epsilon = 1e-8
    config.adam_mu_dtype = "float32"  # bfloat16 saves 2 bytes per weight

    config.mp = "p=f32,c=bfloat16"
    config.attention = config_dict.placeholder(str)  # a backend; unset: the platform's
    config.remat = config_dict.placeholder(str)  # full, attention, products, none; unset: what fits
    config.require_accelerator = False
    config.mesh = dict(data=1, fsdp=-1, context=1, tensor=1)
    config.distributed = dict(
        enabled=False,  # True on every process of a run on several hosts
        coordinator_address=config_dict.placeholder(str),  # unset: given by TPU pods and Slurm
        num_processes=config_dict.placeholder(int),
        process_id=config_dict.placeholder(int),
    )

    config.steps_per_log = 10
    config.steps_per_eval = 500
    config.eval_at = config_dict.placeholder(str)  # "1,5,25": after these steps too
    config.run_initial_eval = True
    config.max_eval_pairs = config_dict.placeholder(int)  # unset: all
    config.validation_texts = dict()  # name="a.txt", or rows with `text`: bits per byte
    config.tasks = ()  # "arc_easy,gsm8k": by lm-evaluation-harness
    config.tasks_folder = config_dict.placeholder(str)  # YAML files of your own
    config.steps_per_checkpoint = 500
    config.minutes_per_checkpoint = config_dict.placeholder(float)  # and so often by the clock
    config.keep_checkpoints = 2  # the newest
    config.keep_every = config_dict.placeholder(int)  # checkpoints at its multiples are kept too
    config.keep_best = config_dict.placeholder(str)  # "validation/dpo_accuracy": the best stays
    config.stop_when = config_dict.placeholder(str)  # "validation/dpo_loss": ends when it is stale
    config.stop_patience = 3  # evaluations
    config.save_retries = 2  # of a failed save, each after the next step; then the run stops
    config.hang_minutes = config_dict.placeholder(float)  # not moved for so long, it ends itself
    config.steps_per_hf_export = 500  # unset: at the end; -1: never
    config.hf_save_dtype = "bfloat16"
    config.hf_text_only = False
    config.push_to_hub = config_dict.placeholder(str)  # "owner/name": the last export is sent there
    config.hub_strategy = "end"  # or every: each export
    config.hub_private = True
    config.sample_tokens = 128  # per answer to held-out prompts; 0: no answers
    config.steps_per_sample = 500  # answers along the way, in samples.jsonl; unset: at the end
    config.sample_prompts = config_dict.placeholder(str)  # a file of one's own; unset: held out
    config.sample_count = 4
    config.sample_temperature = config_dict.placeholder(float)  # 0.7: a drawn answer too

    config.tensorboard = True
    config.profile = config_dict.placeholder(str)  # "11-13": traces these steps
    config.compile_cache = "~/.cache/nnx-zoo/compiled"  # unset: compiles at every start
    config.wandb_project = config_dict.placeholder(str)
    config.trackio_project = config_dict.placeholder(str)
    return config
