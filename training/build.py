"""Build the parts of a training run from its recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from headstart.model.heads.common.base import UNSET, DraftHead
from headstart.model.target.target import Target
from headstart.model.target.weights_hash import target_hash
from headstart.training.config.schema import Recipe, TrainConfig
from headstart.training.data.batching import Batches, Corpus, frequent_tokens
from headstart.training.data.conversations import Conversations, read_conversations
from headstart.training.data.hidden_states import Features, open_features
from headstart.training.data.prefetch import Prefetcher
from headstart.training.distributed.process_group import WorkerGroup
from headstart.training.distributed.strategies import DDPStrategy, FSDP2Strategy, ParallelStrategy
from headstart.training.evaluation.evaluate import Evaluate, Evaluation
from headstart.training.objective.teacher import StoredTeacher, Teacher, TensorParallelTeacher
from headstart.training.optim.precision import resolve_precision
from headstart.training.reporting.metrics_log import Log, Report
from headstart.training.reporting.step_timer import StepTimer

from .cost_estimate import Throughput
from .preflight import check_early, check_fit, check_lengths
from .resume import best_holds, check_same
from .run.checkpoint import FOLDER, load_metadata, load_state
from .run.signals import StopRequest
from .run.train_state import TrainState
from .run_folder import RunFolder


@dataclass(frozen=True)
class TrainingRun:
    """The parts of a run. report: on the main rank only."""

    recipe: Recipe
    target: Target
    head: DraftHead
    workers: WorkerGroup
    data: Prefetcher
    teacher: Teacher
    strategy: ParallelStrategy
    evaluation: Evaluation
    state: TrainState
    folder: RunFolder
    stop: StopRequest
    timer: StepTimer
    throughput: Throughput
    report: Report | None


def build_run(
    recipe: Recipe, target: Target, head: DraftHead, evaluate: Evaluate | None, log: Log | None
) -> TrainingRun:
    """Check everything, read the data and build a run that starts or resumes as the recipe says."""
    checkpoint = Path(recipe.train.output) / FOLDER
    metadata = load_metadata(checkpoint)
    recipe = resolve_precision(check_early(recipe), target, metadata)
    check_fit(recipe, target, head, decodes=evaluate is not None)
    workers, timer = WorkerGroup(target.device), StepTimer(target.device)
    conversations = build_data(recipe, target, workers, metadata)
    features = open_features(recipe, conversations, target, head)
    data = build_prefetcher(recipe, conversations, features, target, workers)
    state = TrainState(total=total_steps(recipe.train, data.batches))
    notes, optimizer = [summary(conversations)], dict[str, Tensor]()
    data_hash = conversations.train.sha256()
    if metadata is None:
        choose_draft_vocab(head, conversations.train)
    else:
        check_same(metadata, checkpoint, data_hash, target_hash(target))
        optimizer = load_state(checkpoint, head)
        head.bind(target)  # drops what was computed from the old weights
        state = state.resumed(metadata)
        if not best_holds(metadata, recipe, checkpoint.with_name("best")):
            state.forget_best()
            notes.append("Evaluation has changed, or the run went back: the best score is reset.")
    teacher = build_teacher(recipe, head, features, workers)
    strategy = build_strategy(recipe, head, teacher, workers, timer)
    strategy.restore(optimizer)
    folder = RunFolder(recipe, target, teacher, state, data_hash)
    folder.saved_step = None if metadata is None else state.step
    stop = StopRequest(folder.describe_saved, announce=workers.is_main)
    return TrainingRun(
        recipe=recipe,
        target=target,
        head=head,
        workers=workers,
        data=data,
        teacher=teacher,
        strategy=strategy,
        evaluation=Evaluation(recipe.loss, data, teacher, strategy, stop, evaluate),
        state=state,
        folder=folder,
        stop=stop,
        timer=timer,
        throughput=Throughput(recipe, target, head, workers.world_size),
        report=build_report(recipe, folder, state, notes, log) if workers.is_main else None,
    )


def build_data(
    recipe: Recipe, target: Target, workers: WorkerGroup, metadata: Mapping[str, Any] | None
) -> Conversations:
    """Read the data and check that all ranks have the same data, recipe and checkpoint."""
    conversations = read_conversations(recipe.data, target, recipe.train.seed)
    check_lengths(conversations, target)
    values = {
        "data": conversations.train.sha256(),
        "recipe": recipe.model_dump_json(),
        "checkpoint": "none" if metadata is None else str(metadata["step"]),
    }
    workers.check_same_on_all_ranks(values)
    return conversations


def build_prefetcher(
    recipe: Recipe,
    data: Conversations,
    features: Features | None,
    target: Target,
    workers: WorkerGroup,
) -> Prefetcher:
    return Prefetcher(
        recipe,
        data,
        features,
        rank=workers.rank,
        world_size=workers.world_size,
        device=workers.device,
        dtype=target.dtype,
        whole=target.is_tensor_parallel,
    )


def build_teacher(
    recipe: Recipe, head: DraftHead, features: Features | None, workers: WorkerGroup
) -> Teacher:
    """Choose the teacher: jointly trained, stored on disk, tensor-parallel, or the target alone."""
    if recipe.joint is not None:
        from .objective.joint_lora import JointLoraTeacher  # peft is optional

        return JointLoraTeacher(recipe.joint, recipe, head)
    if features is not None:
        return StoredTeacher(head, features.index.layers)
    if head.target.is_tensor_parallel:
        return TensorParallelTeacher(head, workers.rank, workers.world_size)
    return Teacher(head)


def build_strategy(
    recipe: Recipe, head: DraftHead, teacher: Teacher, workers: WorkerGroup, timer: StepTimer
) -> ParallelStrategy:
    """Choose the strategy of `parallel.engine`. The head holds the weights to start from."""
    engine = recipe.parallel.engine
    if engine == "ddp":
        return DDPStrategy(head, recipe, workers, timer.mark, teacher.parameters)
    if engine == "fsdp2":
        return FSDP2Strategy(head, recipe, workers, timer.mark)
    from .distributed.deepspeed_zero import ZeROStrategy  # DeepSpeed is optional

    return ZeROStrategy(head, recipe, workers)


def build_report(
    recipe: Recipe, folder: RunFolder, state: TrainState, notes: list[str], log: Log | None
) -> Report:
    folder.path.mkdir(parents=True, exist_ok=True)
    report = Report(recipe, folder.path, log, state.step, state.evaluated)
    for note in notes:
        report.note(state.step, state.total, note)
    return report


def choose_draft_vocab(head: DraftHead, corpus: Corpus) -> None:
    """Give a fresh head the most frequent labels as its draft vocabulary, if it has one."""
    size = head.config.draft_vocab
    if size is not None and head.d2t is not None and bool(head.d2t[0] == UNSET):
        head.set_draft_vocab(frequent_tokens(corpus.token_counts(head.config.vocab_size), size))


def total_steps(config: TrainConfig, batches: Batches) -> int:
    """Return the optimizer steps of the whole run. ValueError where the data is too small."""
    if config.steps is not None:
        return config.steps
    count = batches.count(config.epochs)
    if count < config.accumulate:
        raise ValueError(
            f"The data makes {count} batches in {config.epochs} epochs, fewer than the "
            f"{config.accumulate} of one optimizer step. Lower train.accumulate or "
            "data.global_batch_tokens, or add data."
        )
    return count // config.accumulate


def summary(data: Conversations) -> str:
    """Return what was read, for the user."""
    tokens, trained = len(data.train.tokens), int(data.train.trained.sum())
    text = f"{len(data.train)} conversations, {tokens} tokens, {trained} of them labels"
    if data.dropped:
        text += f"; {data.dropped} dropped, which have no label"
    if data.broken:
        text += f"; {len(data.broken)} broken lines left out, the first: {data.broken[0]}"
    return text
