"""python -m fastcl.train --method swav: from a command line to a trained encoder.

Read it from top to bottom: `main` turns errors into one line and an exit code, `Trainer` sets up a
run (or takes up a saved one) and `fit` is the loop. The run folder then holds config.yaml,
metrics.jsonl (and the same as TensorBoard's events), checkpoint.pt, the one before it, best.pt,
report.png and report.html. Under torchrun every process runs this: see fastcl.parallel.

Exit codes: 0 done; 1 stopped by a loss that is not finite or by a full disk; 2 wrong usage; 130
Ctrl-C; 143 SIGTERM.
"""

import copy
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcl import checkpoint, parallel, report
from fastcl.cached import in_chunks_
from fastcl.compiled import CompileError, compile_
from fastcl.config import Request, UsageError, as_dict, claim_folder, parse, to_yaml
from fastcl.data import Loader, TensorSplit, augment, load
from fastcl.data.splits import summary as unreadable_summary
from fastcl.evaluate import knn_accuracy, pixel_knn_accuracy
from fastcl.interrupt import Interrupt
from fastcl.methods import METHODS, Progress
from fastcl.optim import learning_rate_at, optimizer_of
from fastcl.parallel import ALONE, Processes, RandomState, Silent
from fastcl.progress import (
    Metrics,
    ProgressBar,
    collapse_signs,
    effective_rank,
    feature_std,
)

LOOKED_AT = 64  # training images that a method may refuse
PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Stopped(Exception):
    """Training cannot go on; the message is one line for the user, the last checkpoint is kept."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        request = parse(sys.argv[1:] if argv is None else argv)
        if request.print_config:
            print(to_yaml(as_dict(request.run, request.config)), end="")
            return 0
        with Interrupt() as interrupt:
            try:
                with parallel.started(request.run.device, request.run.timeout) as processes:
                    return _run(request, interrupt, processes)
            except KeyboardInterrupt:  # before the first step, or while saving
                return _fail("stopped", 128 + (interrupt.signal or 2))
    except UsageError as error:
        return _fail(f"error: {error}", 2, parallel.launched_first())


def _run(request: Request, interrupt: Interrupt, processes: Processes) -> int:
    """The run itself; how it fails is said by one of its processes."""
    if processes.world > 1:
        interrupt.agree = processes.agree
    trainer = None
    try:
        try:
            trainer = Trainer(request, interrupt, processes)
        except (ValueError, OSError) as error:  # what data, models and loader say of a wrong value
            raise UsageError(" ".join(str(error).split())) from None
        return trainer.fit()
    except UsageError as error:
        return _fail(f"error: {error}", 2, processes.may_speak())
    except Stopped as error:
        return _fail(str(error), 1, processes.may_speak())
    except RuntimeError as error:
        if (lost := processes.lost(error)) is None:
            raise
        kept = f"; {trainer.kept()}" if trainer else ""
        return _fail(lost + kept, 1, processes.may_speak())


def _fail(message: str, code: int, aloud: bool = True) -> int:
    if aloud:
        print(f"fastcl.train: {message}", file=sys.stderr, flush=True)
    return code


class Trainer:
    """One run: its data, method, optimizer and position."""

    def __init__(
        self, request: Request, interrupt: Interrupt, processes: Processes = ALONE
    ) -> None:
        self.run, self.config, self.interrupt = request.run, request.config, interrupt
        run, config = self.run, self.config
        self.processes = processes
        self.device = parallel.device_of(processes.device or run.device)
        self.data = load(
            run.data,
            data_dir=run.data_dir,
            download=run.download,
            image_column=run.image_column,
            label_column=run.label_column,
        )
        image_size = config.image_size or self.data.image_size

        torch.manual_seed(run.seed)
        method = METHODS[run.method]
        self.method = method(method.build_encoder(config, image_size), config)
        self.method.look(next(self.data.pretrain.batches(LOOKED_AT))[0])
        self.method.set_images(len(self.data.pretrain))
        self.method.to(self.device).to(memory_format=self._layout)
        for encoder in self.method.encoders():
            if run.compile:
                compile_(encoder)
            if run.micro_batch:
                processes.check_chunks(config.batch_size)
                in_chunks_(encoder, run.micro_batch)
        self.loss = processes.share_out(self.method, run.seed)
        self.augmentation = augment.build(
            config.augmentation,
            image_size=image_size,
            mean=self.data.mean,
            std=self.data.std,
            crops=self.method.crops(image_size),
            strength=config.jitter,
            blur=config.blur,
            colours=config.colours,
        )
        self.loader = Loader(
            self.data.pretrain,
            self.augmentation,
            batch_size=config.batch_size,
            seed=run.seed,
            workers=run.workers,
            rank=processes.rank,
            world=processes.world,
        )
        self.optimizer = optimizer_of(self.method, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=run.precision == "fp16")

        self.step = 0  # optimizer steps done
        self.steps = config.epochs * len(self.loader)
        self.losses: list[Tensor] = []  # since the last row of metrics, not yet read
        self.knn: dict[int, float] = {}  # step -> accuracy
        self.raw_pixels: float | None = None
        self.last: dict[str, Any] = {}  # the last row of metrics
        self.saved: int | None = None  # the step of checkpoint.pt

        self.folder = processes.first_does(lambda: claim_folder(request))
        self.path = self.folder / checkpoint.NAME
        if request.checkpoint is not None:
            self._restore(request)
        processes.first_does(lambda: self._prepare_folder(request))
        self.metrics: Metrics | Silent = Silent()
        self.bar: ProgressBar | Silent = Silent()
        if processes.first:
            path = self.folder / "metrics.jsonl"
            self.metrics = Metrics(path, self.saved, tensorboard=run.tensorboard)
            self.bar = ProgressBar(self.steps, self.step)

    # ---- the loop --------------------------------------------------------------------------------

    def fit(self) -> int:
        """Train to the end. Returns the exit code."""
        run, config = self.run, self.config
        self.bar.say(
            f"{run.method} on {run.data} ({len(self.data.pretrain):,} images), {config.backbone}, "
            f"{config.epochs} epochs of {len(self.loader)} steps -> {self.folder}"
        )
        try:
            if self._evaluate() and self.step:  # stopped before it could be saved
                self._save()
            self._clock()
            while self.step < self.steps:
                self._place_loader()
                for views, _, indices in self.loader:
                    with self.interrupt.hold():
                        views = [self._placed(view) for view in views]
                        self._step(views, indices.to(self.device, non_blocking=True))
                        if self.step % run.log_every == 0 or self.step == self.steps:
                            self._log()
                    between = self.step % len(self.loader) > 0  # at the end kNN comes first
                    if between and self._steps_due():
                        self._save()
                self._evaluate()
                due = self._epoch % run.checkpoint_every == 0 or self.step == self.steps
                if due or self._steps_due() or self._copies():
                    self._save()
            self._summary()
            return 0
        except KeyboardInterrupt:
            return self._interrupted()
        except CompileError as error:
            raise Stopped(f"{error}; go on without --compile") from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise Stopped(f"cannot write to {self.folder}: {reason}; {self.kept()}") from None
        finally:
            self.metrics.close()
            self.bar.close()

    def _step(self, views: list[Tensor], indices: Tensor) -> None:
        """One optimizer step on a batch of views of these images."""
        at = Progress(self.step, len(self.loader), self.config.epochs, indices)
        lr = learning_rate_at(self.step, self.config, len(self.data.pretrain))
        weight_decay = self.method.weight_decay_at(at)
        for group in self.optimizer.param_groups:
            if not group.get("fixed"):
                group["lr"] = lr
            if weight_decay is not None and not group.get("undecayed"):
                group["weight_decay"] = weight_decay
        self.method.train()
        self.optimizer.zero_grad()
        with self._autocast():
            loss = self.loss(views, at)
        self.scaler.scale(loss).backward()
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        self.method.after_backward(at)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.method.after_step(at)
        self.losses.append(loss.detach())
        self.step += 1

    def _placed(self, view: Tensor) -> Tensor:
        return view.to(self.device, non_blocking=True, memory_format=self._layout)

    @property
    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.run.channels_last else torch.preserve_format

    def _steps_due(self) -> bool:
        every = self.run.checkpoint_steps
        return every > 0 and self.step % every == 0

    def _autocast(self) -> torch.autocast:
        dtype = PRECISION.get(self.run.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    @property
    def _epoch(self) -> int:
        return self.step // len(self.loader)

    def _place_loader(self) -> None:
        """The loader's position follows from the step: an interrupted wait loses no batch."""
        epoch, batch = divmod(self.step, len(self.loader))
        self.loader.load_state_dict({"seed": self.run.seed, "epoch": epoch, "batch": batch})

    # ---- what it writes --------------------------------------------------------------------------

    def _log(self) -> None:
        """A row of metrics.jsonl. Raises Stopped at the first loss that is not finite."""
        loss = self._read_losses()
        embedding = self.processes.rows(self.method.embedding)
        now = time.monotonic()
        rate = (self.step - self.since_step) * self.config.batch_size / (now - self.since)
        at = Progress(self.step - 1, len(self.loader), self.config.epochs)
        self.last = {
            "step": self.step,
            "epoch": round(self.step / len(self.loader), 4),
            "loss": loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            "momentum": self.method.momentum_at(at),
            "feature_std": feature_std(embedding),
            "effective_rank": effective_rank(embedding),
            "images_per_second": round(rate, 1),
            "loss_if_collapsed": self.method.collapsed_loss(),
            "feature_std_even": embedding.shape[1] ** -0.5,
            "effective_rank_most": min(embedding.shape),
        }
        self.metrics.write(**self.last)
        self.bar.update(self.step, loss, rate)
        self.losses.clear()
        self._clock()

    def _read_losses(self) -> float:
        """The mean loss since the last row; the only place where the host waits for the device."""
        self.losses = self.processes.means(self.losses)
        values = torch.stack(self.losses).float().tolist() if self.losses else []
        for back, value in enumerate(reversed(values)):
            if not math.isfinite(value):
                bad = self.step - back
        if not all(map(math.isfinite, values)):
            raise Stopped(f"the loss of step {bad} is {values[bad - self.step - 1]}; {self.kept()}")
        return sum(values) / max(len(values), 1)

    def _clock(self) -> None:
        self.since, self.since_step = time.monotonic(), self.step

    def _evaluate(self) -> bool:
        """kNN before the first step, every `eval_every` epochs and at the end; each once.

        Returns whether it was due.
        """
        every = self.run.eval_every
        due = self.step in (0, self.steps) or (
            every > 0 and self.step % (every * len(self.loader)) == 0
        )
        if not due or self.step in self.knn or not self.data.labelled:
            return False
        row: dict[str, Any] = {"step": self.step, "epoch": self._epoch}
        if self.step == 0 and isinstance(self.data.train, TensorSplit):  # else too many pixels
            self.raw_pixels = self.processes.first_does(lambda: pixel_knn_accuracy(self.data))
            row["knn_top1_raw_pixels"] = self.raw_pixels
        accuracy = self.processes.first_does(self._knn_accuracy)
        with self.interrupt.hold():  # a row whose number is not saved would be written again
            self.metrics.write(**row, knn_top1=accuracy)
            self.knn[self.step] = accuracy
        self.bar.say(f"epoch {self._epoch}: kNN {accuracy:.1%}")
        self._clock()
        return True

    def _knn_accuracy(self) -> float:
        with self._autocast():
            return knn_accuracy(
                self.method.get_submodule(self.method.kept),
                self.data,
                normalize=self.augmentation.normalize,
                device=self.device,
            )

    def _prepare_folder(self, request: Request) -> None:
        if request.checkpoint is not None:
            if request.checkpoint != self.path:  # what was damaged or given up must not be kept
                checkpoint.keep(request.checkpoint, checkpoint.NAME)
            self._keep()
        values = to_yaml(as_dict(self.run, self.config))
        checkpoint.replace_text(self.folder / "config.yaml", values)

    def _save(self) -> None:
        """checkpoint.pt: everything that the rest of the run depends on."""
        self._read_losses()
        random = self.processes.random_states()
        self.processes.first_does(lambda: self._write(random))
        self.saved = self.step

    def _write(self, random: list[RandomState]) -> None:
        state = {
            "values": as_dict(self.run, self.config),
            "step": self.step,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "losses": [loss.cpu() for loss in self.losses],
            "knn": self.knn,
            "raw_pixels": self.raw_pixels,
            "random": random,
        }
        checkpoint.save(self.path, state)
        self._keep()

    def _keep(self) -> None:
        for name in self._copies():
            checkpoint.keep(self.path, name)

    def _copies(self) -> list[str]:
        """The other names that this step's checkpoint is kept under."""
        epoch, rest = divmod(self.step, len(self.loader))
        every = self.run.keep_every
        names = [f"checkpoint-epoch{epoch}.pt"] if every and not rest and not epoch % every else []
        trained = {step: accuracy for step, accuracy in self.knn.items() if step}
        if trained and max(trained, key=trained.__getitem__) == self.step:
            names.append("best.pt")
        return names

    def _restore(self, request: Request) -> None:
        """The inverse of `_save`. Raises ValueError when the checkpoint is of another model."""
        assert request.checkpoint is not None
        state = checkpoint.load(request.checkpoint)
        try:
            self.method.load_state_dict(state.pop("method"))  # into place: a bank is not held twice
            state = copy.deepcopy(state)  # the optimizer keeps what it gets; the file is let go
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{request.checkpoint} is of another model than these flags ask for: {reason}"
            ) from None
        self.scaler.load_state_dict(state["scaler"])
        self.step = self.saved = int(state["step"])
        self.losses = [loss.to(self.device) for loss in state["losses"]]
        self.knn, self.raw_pixels = state["knn"], state["raw_pixels"]
        self.processes.set_random_states(state["random"])
        if request.changed and self.processes.first:
            names = ", ".join(sorted(request.changed))
            print(f"resumed with other values than before: {names}", flush=True)

    # ---- how it ends -----------------------------------------------------------------------------

    def _interrupted(self) -> int:
        number = self.interrupt.signal or 2
        if self.interrupt.clean and self.saved != self.step:
            try:
                self._save()
            except OSError as error:
                raise Stopped(f"stopped; cannot save: {error.strerror}; {self.kept()}") from None
        message = f"stopped at step {self.step} of {self.steps}; {self.kept()}"
        return _fail(message, 128 + number, self.processes.may_speak())

    def kept(self) -> str:
        """Where the last checkpoint is, and how to go on from it."""
        if self.saved is None:
            return "no checkpoint was written before"
        return (
            f"the checkpoint of step {self.saved} is {self.path}; "
            f"go on with: {self.processes.launcher} -m fastcl.train --resume {self.folder}"
        )

    def _summary(self) -> None:
        """The three numbers, and a word if the embeddings collapsed."""
        self.bar.close()
        if not self.processes.first:
            return
        if signs := collapse_signs(self.last):
            print(f"note: the embeddings have collapsed: {'; '.join(signs)}")
        if skipped := self.data.unreadable:
            print(f"note: skipped {unreadable_summary(skipped)}")
        final, first = self.knn.get(self.steps), self.knn.get(0)
        numbers = {"trained encoder": final, "untrained encoder": first}
        numbers["raw pixels"] = self.raw_pixels
        shown = (f"{name} {value:.1%}" for name, value in numbers.items() if value is not None)
        accuracy = ", ".join(shown) or "none, as the images have no labels"
        print(f"kNN accuracy: {accuracy}\n{self.path}", flush=True)
        if self.run.report:
            print(report.after_training(self.folder, self.data, self.device), flush=True)


if __name__ == "__main__":
    sys.exit(main())
