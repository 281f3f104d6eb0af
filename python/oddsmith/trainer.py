"""ORPOTrainer: ORPO on the Hugging Face Trainer."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import AutoTokenizer, Trainer, set_seed
from transformers.utils import logging

from . import fused, plain
from .config import ORPOConfig
from .data import (
    PreferenceCollator,
    RowBuilder,
    check_vocabulary,
    ensure_pad_token,
    prepare_dataset,
)
from .data_lints import lint_rows
from .generation import write_table
from .metrics import MetricStore
from .model_card import model_card
from .model_loading import add_adapter, disable_dropout, let_inputs_require_grad, load_model

logger = logging.get_logger(__name__)


class ORPOTrainer(Trainer):
    """
    Trains a language model on preference pairs with ORPO, as TRL's class of this name does.

    Hong et al. 2024 (arXiv 2403.07691). Losses and metrics are TRL's; the output head and the loss
    run in Rust, which never holds the logits of a batch. A subclass that overrides
    `concatenated_forward`, `get_batch_logps` or `odds_ratio_loss` gets the path through logits that
    calls them.

    Args:
        model (`PreTrainedModel`, `PeftModel` or `str`, *optional*):
            The model, or the id or folder to load it from.
        args ([`ORPOConfig`], *optional*):
            All settings.
        data_collator (`Callable`, *optional*):
            Makes batches of rows; [`~oddsmith.data.PreferenceCollator`] if not given.
        train_dataset (`Dataset` or `IterableDataset`):
            Rows with `chosen` and `rejected`, and `prompt` where it is not implicit.
        eval_dataset (`Dataset`, `IterableDataset`, or a `dict` of them, *optional*):
            Rows to evaluate on. With a dict every metric carries the name of its dataset.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer; loaded by the model's name if not given.
        model_init (`Callable`, *optional*):
            Makes the model, where `model` is not given.
        callbacks, optimizers, preprocess_logits_for_metrics, compute_metrics:
            As in [`~transformers.Trainer`].
        peft_config (`PeftConfig`, *optional*):
            Adapter to train instead of the model's own weights.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Older name of `processing_class`.

    Raises:
        ValueError: For data, settings or a model that cannot be trained with; before training.
        TypeError: For an argument of the wrong type.
    """

    # compute_loss returns the mean of a micro-batch: Trainer divides by the accumulation steps.
    loss_is_scaled_for_ga = False

    _tag_names = ["oddsmith", "orpo"]
    _hooks = ("concatenated_forward", "get_batch_logps", "odds_ratio_loss")

    def __init__(
        self,
        model: Any = None,
        args: ORPOConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: Any = None,
        compute_metrics: Callable | None = None,
        *,
        tokenizer: Any = None,
    ):
        args = ORPOConfig(output_dir="orpo_output") if args is None else args
        if not isinstance(args, ORPOConfig):
            raise TypeError(
                f"args is a {type(args).__module__}.{type(args).__name__}; must be an "
                "oddsmith.ORPOConfig: import it from oddsmith too"
            )
        if tokenizer is not None:
            if processing_class is not None:
                raise ValueError("tokenizer and processing_class are the same; pass one of them")
            processing_class = tokenizer
        if train_dataset is None:
            raise ValueError("train_dataset is None; ORPO needs rows with chosen and rejected")
        if args.model_init_kwargs is not None and model is not None and not isinstance(model, str):
            raise ValueError(
                "model_init_kwargs are for loading a model by name, and the model is loaded already"
            )
        # Adapters draw their first weights.
        set_seed(args.seed)
        self._peft_config = peft_config
        name = model if isinstance(model, str) else None
        if name is not None:
            model = load_model(name, args)
        if model is not None:
            model = self._ready(model, args)
            self.is_encoder_decoder = fused.base_model(model).config.is_encoder_decoder
        else:
            self.is_encoder_decoder = bool(args.is_encoder_decoder)

        if processing_class is None:
            processing_class = _load_tokenizer(name, model, args)
        pad_token_id = ensure_pad_token(processing_class)
        self.padding_value = pad_token_id if args.padding_value is None else args.padding_value
        self.max_length = args.max_length
        self.max_prompt_length = args.max_prompt_length
        self.max_completion_length = args.max_completion_length
        self.truncation_mode = args.truncation_mode
        self.label_pad_token_id = args.label_pad_token_id
        self.generate_during_eval = args.generate_during_eval
        self.beta = args.beta
        self._metrics = MetricStore()
        self._told: set[str] = set()
        # tokenize_row is called before Trainer's own constructor has run.
        self.processing_class = processing_class
        self._builder = RowBuilder(
            processing_class,
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            truncation_mode=self.truncation_mode,
            label_pad_token_id=self.label_pad_token_id,
            is_encoder_decoder=self.is_encoder_decoder,
            max_completion_length=self.max_completion_length,
            padding_value=self.padding_value,
        )
        self.max_completion_length = self._builder.max_completion_length
        with args.main_process_first(desc="preparing the datasets"):
            train_dataset = self._prepare(train_dataset, model, args, "train_dataset")
            if eval_dataset is not None:
                eval_dataset = self._prepare(eval_dataset, model, args, "eval_dataset")

        self.use_dpo_data_collator = data_collator is None
        if data_collator is None:
            data_collator = PreferenceCollator(
                self.padding_value, self.label_pad_token_id, self.is_encoder_decoder
            )
            # The collator reads columns that are no arguments of the model.
            args.remove_unused_columns = False
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init if model is None else None,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        # transformers before 5.19 does not read loss_is_scaled_for_ga.
        self.model_accepts_loss_kwargs = False
        config = fused.base_model(self.model).config
        if config.is_encoder_decoder != self.is_encoder_decoder:
            raise ValueError(
                f"is_encoder_decoder is {args.is_encoder_decoder} but model_init made a model for "
                f"which it is {config.is_encoder_decoder}; set it in ORPOConfig"
            )
        self.aux_loss_enabled = bool(getattr(config, "output_router_logits", False))
        self.aux_loss_coef = getattr(config, "router_aux_loss_coef", 0.0)
        if self.aux_loss_enabled and not self.aux_loss_coef:
            logger.warning(
                "config.output_router_logits is set but router_aux_loss_coef is 0: the auxiliary "
                "loss has no effect"
            )
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    # ---- Setting up ----

    def _ready(self, model: nn.Module, args: ORPOConfig) -> nn.Module:
        """Adds the adapter, prepares gradients and dropout, and chooses the path of the loss."""
        core = fused.base_model(model)
        if not hasattr(core, "get_output_embeddings") or core.get_output_embeddings() is None:
            raise ValueError(
                f"{type(core).__name__} has no output head to predict tokens with; load the model "
                "with AutoModelForCausalLM or AutoModelForSeq2SeqLM"
            )
        if self._peft_config is not None:
            model = add_adapter(model, self._peft_config, args)
        if args.gradient_checkpointing:
            let_inputs_require_grad(model)
        if args.disable_dropout:
            disable_dropout(model)
        self._fused = self._choose_path(model, args)
        return model

    def _choose_path(self, model: nn.Module, args: ORPOConfig) -> bool:
        own = [name for name in self._hooks if _overridden(self, name)]
        if own:
            reason = f"{type(self).__name__} overrides {', '.join(own)}"
        elif not args.use_fused_head:
            reason = "use_fused_head is False"
        else:
            reason = fused.obstacle(model)
        if reason is None:
            fused.attach(model)
            return True
        logger.warning(f"The loss is computed from the logits of the whole batch: {reason}.")
        return False

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return self._ready(super().call_model_init(trial), self.args)

    def _prepare(self, dataset: Any, model: nn.Module | None, args: ORPOConfig, name: str) -> Any:
        own = any(_overridden(self, hook) for hook in ("tokenize_row", "build_tokenized_answer"))
        prepared = prepare_dataset(
            dataset,
            self.processing_class,
            self.tokenize_row if own else self._builder.tokenize_row,
            num_proc=args.dataset_num_proc,
            overlength=args.overlength,
            name=name,
            builder=self._builder,
        )
        parts = prepared if isinstance(prepared, dict) else {None: prepared}
        for key, part in parts.items():
            part_name = name if key is None else f"{name}[{key!r}]"
            if model is not None:
                vocabulary = fused.base_model(model).get_input_embeddings().weight.shape[0]
                if vocabulary:  # 0 where ZeRO-3 holds the weight elsewhere
                    check_vocabulary(part, vocabulary, name=part_name)
            if isinstance(part, Dataset):
                limit = self.max_length
                for line in lint_rows(part, self.processing_class, max_length=limit, name=part_name):
                    logger.warning(line)
        return prepared

    def build_tokenized_answer(self, prompt: str, answer: str) -> dict[str, list[int]]:
        """See [`~oddsmith.data.RowBuilder.build_tokenized_answer`]."""
        return self._builder.build_tokenized_answer(prompt, answer)

    def tokenize_row(self, feature: Mapping, model: nn.Module | None = None) -> dict[str, Any]:
        """See [`~oddsmith.data.RowBuilder.tokenize_row`]."""
        return self._builder.tokenize_row(feature, model, self.build_tokenized_answer)

    # ---- The loss ----

    @staticmethod
    def concatenated_inputs(
        batch: Mapping[str, Any],
        is_encoder_decoder: bool = False,
        padding_value: int = 0,
        device: torch.device | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Chosen and rejected sequences of a batch in one.

        Args:
            batch (`Mapping`): Tensors `chosen_*` and `rejected_*`, each `(B, T)`.
            is_encoder_decoder (`bool`): The prompts become the encoder's inputs.
            padding_value (`int`): Pads token ids.
            device (`torch.device`, *optional*): Where the result goes.

        Returns:
            `dict[str, Tensor]`: `concatenated_*`, each `(2B, T)`, chosen first.
        """
        sides = ("chosen", "rejected")
        kind = "labels" if is_encoder_decoder else "input_ids"
        length = max(batch[f"{side}_{kind}"].shape[1] for side in sides)
        out = {}
        for key in (k for k in batch if k.startswith("chosen_")):
            pair = [batch[key], batch.get(key.replace("chosen", "rejected", 1))]
            if not all(isinstance(x, torch.Tensor) for x in pair):
                continue
            pad = 0 if key.endswith("_attention_mask") else padding_value
            pad = -100 if "labels" in key or is_encoder_decoder else pad
            padded = [F.pad(x, (0, length - x.shape[1]), value=pad) for x in pair]
            out[key.replace("chosen", "concatenated", 1)] = torch.cat(padded).to(device)
        if is_encoder_decoder:
            for kind in ("input_ids", "attention_mask"):
                out[f"concatenated_{kind}"] = batch[f"prompt_{kind}"].repeat(2, 1).to(device)
        return out

    def odds_ratio_loss(
        self, policy_chosen_logps: torch.Tensor, policy_rejected_logps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The odds-ratio term from mean log-probabilities, `(B,)` each.

        Returns:
            `tuple`: What is subtracted from the likelihood term per pair (TRL calls it losses),
            rewards of chosen and of rejected, mean log-sigmoid of the log odds, mean log odds.
        """
        chosen, rejected = policy_chosen_logps.float(), policy_rejected_logps.float()
        log_odds = plain.log_odds_ratio(chosen, rejected)
        ratio = F.logsigmoid(log_odds)
        link = ratio if self.args.odds_ratio_link == "logsigmoid" else log_odds
        rewards = [self.beta * logps.detach() for logps in (chosen, rejected)]
        return self.beta * link, *rewards, ratio.mean(), log_odds.mean()

    @staticmethod
    def get_batch_logps(
        logits: torch.Tensor,
        labels: torch.Tensor,
        average_log_prob: bool = False,
        is_encoder_decoder: bool = False,
    ) -> torch.Tensor:
        """Log-probability of each sequence's labels, `(B,)`: see [`~oddsmith.plain.label_logps`]."""
        return plain.label_logps(logits, labels, average_log_prob, is_encoder_decoder)

    def _model_inputs(self, whole: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        inputs = {
            "input_ids": whole["concatenated_input_ids"],
            "attention_mask": whole["concatenated_attention_mask"],
            "use_cache": False,
        }
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        if self.is_encoder_decoder:
            config = fused.base_model(self.model).config
            inputs["decoder_input_ids"] = plain.shift_right(
                whole["concatenated_labels"], config.decoder_start_token_id, config.pad_token_id
            )
        return inputs

    def _concatenate(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return self.concatenated_inputs(
            batch,
            is_encoder_decoder=self.is_encoder_decoder,
            padding_value=self.padding_value,
            device=self.accelerator.device,
        )

    def concatenated_forward(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple:
        """
        One forward pass over chosen and rejected sequences, through logits.

        Returns:
            `tuple`: Mean completion log-probabilities of chosen and of rejected `(B,)`, logits of
            chosen and of rejected, negative log-likelihood of chosen; the auxiliary loss too if
            `aux_loss_enabled`.
        """
        whole = self._concatenate(batch)
        outputs = model(**self._model_inputs(whole))
        logits, half = outputs.logits, batch["chosen_labels"].shape[0]
        shifted, labels = self.is_encoder_decoder, whole["concatenated_labels"]
        if shifted or self.args.nll_scope == "completion":
            likely = labels
        else:
            likely = torch.where(
                whole["concatenated_attention_mask"] == 1, whole["concatenated_input_ids"], -100
            )
        nll = plain.nll(logits[:half], likely[:half].to(logits.device), shifted)
        logps = self.get_batch_logps(
            logits, labels.to(logits.device), average_log_prob=True, is_encoder_decoder=shifted
        )
        seen = logits if shifted else logits[:, :-1]
        out = (logps[:half], logps[half:], seen[:half], seen[half:], nll)
        return (*out, outputs.aux_loss) if self.aux_loss_enabled else out

    def get_batch_loss_metrics(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        train_eval: Literal["train", "eval"] = "train",
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Loss of a batch, and its metrics as 0-dim tensors, named `eval_*` for `"eval"`.

        The loss is `nll - beta * mean(link(log_odds))`, plus the weighted auxiliary loss of a
        mixture of experts.
        """
        self._set_beta()
        loss, aux_loss, metrics = (self._fused_loss if self._fused else self._plain_loss)(model, batch)
        if self.aux_loss_enabled:
            loss = loss + self.aux_loss_coef * aux_loss
        if self.args.beta_schedule != "constant":
            metrics["beta"] = torch.tensor(self.beta)
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, {f"{prefix}{name}": value.detach() for name, value in metrics.items()}

    def _set_beta(self) -> None:
        if self.args.beta_schedule != "constant" and self.state.max_steps > 0:
            self.beta = self.args.beta_at(self.state.global_step, self.state.max_steps)

    def _fused_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple:
        whole = self._concatenate(batch)
        inputs = self._model_inputs(whole)
        labels = whole["concatenated_labels"]
        out = fused.fused_forward(
            model,
            fused.predicting_rows(inputs["input_ids"], inputs["attention_mask"], labels),
            inputs,
            beta=self.beta,
            num_pairs=labels.shape[0] // 2,
            nll_scope=self.args.nll_scope,
            odds_ratio_link=self.args.odds_ratio_link,
            logits_budget=self.args.logits_budget,
        )
        chosen, rejected = out["chosen_logps"], out["rejected_logps"]
        metrics = _preferences(self.beta * chosen, self.beta * rejected, chosen, rejected)
        metrics |= {
            "logits/rejected": out["rejected_logits"],
            "logits/chosen": out["chosen_logits"],
            "nll_loss": out["nll_loss"],
            "log_odds_ratio": out["log_odds_ratio"].mean(),
            "log_odds_chosen": out["log_odds_chosen"].mean(),
            "empty_completions": out["empty_completions"].float(),
        }
        return out["loss"], out.get("aux_loss"), metrics

    def _plain_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple:
        chosen, rejected, chosen_logits, rejected_logits, nll, *aux = self.concatenated_forward(
            model, batch
        )
        terms, *rewards, log_odds_ratio, log_odds = self.odds_ratio_loss(chosen, rejected)
        first = 0 if self.is_encoder_decoder else 1
        sides = [batch[f"{side}_labels"][:, first:] for side in ("chosen", "rejected")]
        # A pair with an empty side has no odds ratio and contributes nothing to it.
        whole = torch.stack([(labels >= 0).any(-1) for labels in sides]).all(0).to(terms.device)
        loss = nll - torch.where(whole, terms, 0.0).mean()
        metrics = _preferences(*rewards, chosen, rejected)
        for side, logits in (("rejected", rejected_logits), ("chosen", chosen_logits)):
            kind = "labels" if self.is_encoder_decoder else "attention_mask"
            mask = batch[f"{side}_{kind}"]
            mask = mask >= 0 if self.is_encoder_decoder else mask[:, 1:] == 1
            mask = F.pad(mask, (0, logits.shape[1] - mask.shape[1])).to(logits.device)
            metrics[f"logits/{side}"] = plain.mean_logits(logits, mask)
        metrics |= {
            "nll_loss": nll,
            "log_odds_ratio": log_odds_ratio,
            "log_odds_chosen": log_odds,
            "empty_completions": (~whole).sum().float(),
        }
        return loss, aux[0] if aux else None, metrics

    def _autocast(self) -> Any:
        """What a quantised model's float adapter needs outside of accelerate's own autocast."""
        if self.args.bf16 and getattr(self.model, "is_loaded_in_4bit", False):
            return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Loss of a micro-batch; its metrics wait for the next log."""
        with self._autocast():
            loss, metrics = self.get_batch_loss_metrics(model, inputs, train_eval="train")
        loss = loss.to(self.args.device)
        self.store_metrics(metrics, train_eval="train")
        return (loss, metrics) if return_outputs else loss

    # ---- Evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple:
        """Loss of an evaluation batch, and the mean logits of both sides as its predictions."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self._autocast():
            loss, metrics = self.get_batch_loss_metrics(model, inputs, train_eval="eval")
        self.store_metrics(metrics, train_eval="eval")
        if prediction_loss_only:
            return loss.detach(), None, None
        names = [f"eval_logits/{side}" for side in ("chosen", "rejected")]
        logits = torch.stack([metrics[name] for name in names if name not in (ignore_keys or ())])
        return loss.detach(), logits, torch.zeros_like(logits)

    def generate_from_model(self, model: nn.Module, batch: Mapping[str, Any]) -> list[str]:
        """Prompts of a batch with the model's sampled completions, as texts."""
        with self._autocast():
            tokens = model.generate(
                input_ids=batch["prompt_input_ids"],
                attention_mask=batch["prompt_attention_mask"],
                max_length=self.max_length,
                do_sample=True,
                pad_token_id=self.processing_class.pad_token_id,
            )
        return self.processing_class.batch_decode(tokens, skip_special_tokens=True)

    def _generate_table(self, dataset: Any) -> None:
        size = self.args.eval_batch_size
        if isinstance(dataset, Dataset):
            picked = random.sample(range(len(dataset)), k=min(size, len(dataset)))
            rows = [dataset[i] for i in picked]
        else:
            rows = list(islice(dataset, size))
        batch = self._prepare_inputs(self.data_collator(rows))
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                texts = self.generate_from_model(model, batch)
        finally:
            model.train(training)
        if self.is_world_process_zero():
            prompts = batch["prompt"]
            rows = [(p, t.removeprefix(p)) for p, t in zip(prompts, texts, strict=True)]
            write_table(rows, self.args, self.state.global_step)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Trainer's loop, with the preference metrics under `metric_key_prefix`."""
        if self.generate_during_eval:
            self._generate_table(dataloader.dataset)
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        for name, value in self._read_metrics("eval").items():
            output.metrics[f"{metric_key_prefix}_{name.removeprefix('eval_')}"] = value
        return output

    # ---- Reporting ----

    def store_metrics(
        self, metrics: Mapping[str, Any], train_eval: Literal["train", "eval"] = "train"
    ) -> None:
        """Keep metrics of a micro-batch for the next log, which averages them."""
        self._metrics.add(train_eval, metrics)

    def _read_metrics(self, split: str) -> dict[str, float]:
        metrics = self._metrics.pop(split, self.accelerator)
        for name in ("empty_completions", "eval_empty_completions"):
            if metrics.get(name) == 0.0:
                del metrics[name]
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken and split not in self._told:
            self._told.add(split)
            logger.warning(
                f"{', '.join(broken)} not finite at step {self.state.global_step} ({split}); the "
                "model's weights or its inputs hold NaN or infinity, or the learning rate is too high"
            )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log values, with the metrics stored since the last log."""
        logs.update(self._read_metrics("train" if "loss" in logs else "eval"))
        super().log(logs, start_time)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: Any = None,
        **kwargs: Any,
    ) -> None:
        """Write a README.md for the model to the output folder."""
        if self.is_world_process_zero():
            base = getattr(fused.base_model(self.model).config, "_name_or_path", None)
            base = None if not base or Path(base).exists() else base
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            text = model_card(model_name, base, dataset_name, self.args)
            (folder / "README.md").write_text(text, encoding="utf-8")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = self.args.hub_model_id or self.args.output_dir
        self.create_model_card(model_name=Path(name).name)
        super()._save_checkpoint(model, trial)


def _overridden(trainer: ORPOTrainer, name: str) -> bool:
    """True if a subclass, or the instance itself, has its own method of this name."""
    own = trainer.__dict__.get(name)
    return own is not None or getattr(type(trainer), name) is not getattr(ORPOTrainer, name)


def _load_tokenizer(name: str | None, model: nn.Module | None, args: ORPOConfig) -> Any:
    if name is None and model is not None:
        name = getattr(fused.base_model(model).config, "_name_or_path", None)
    if not name:
        raise ValueError("processing_class is None and the model has no name to load one by; pass one")
    revision = (args.model_init_kwargs or {}).get("revision")
    return AutoTokenizer.from_pretrained(
        name, revision=revision, trust_remote_code=args.trust_remote_code
    )


def _preferences(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The metrics that rewards and log-probabilities give, in TRL's order."""
    return {
        "rewards/chosen": chosen_rewards.mean(),
        "rewards/rejected": rejected_rewards.mean(),
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float().mean(),
        "rewards/margins": (chosen_rewards - rejected_rewards).mean(),
        "logps/rejected": rejected.mean(),
        "logps/chosen": chosen.mean(),
    }
