"""What a run shows on the terminal while it trains."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

__all__ = ["LogAtStops", "ProgressDisplay"]


class LogAtStops(TrainerCallback):
    """Logs where the model is saved or evaluated and where training ends, beside every ``log_every`` steps.

    Trainer forgets the losses since its last log line when a checkpoint is continued, so without a line at each
    checkpoint a resumed run would log other means than an undisturbed one.
    """

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save or control.should_evaluate or control.should_training_stop:
            control.should_log = True
        return control

    on_epoch_end = on_step_end


class ProgressDisplay(TrainerCallback):
    """A progress bar with the last loss on a terminal; one line per log entry elsewhere, such as in a file."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._bar: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero or not self._console.is_terminal:
            return
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
        self._bar = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.description}"), console=self._console)
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._bar:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        shown = {"loss": "loss", "eval_loss": "eval loss", "learning_rate": "lr"}
        text = "  ".join(f"{name} {logs[key]:.4g}" for key, name in shown.items() if key in logs)
        if not text:
            return
        if self._bar:
            self._bar.update(self._task, description=text)
        else:
            self._console.print(f"step {state.global_step}/{state.max_steps}  {text}", highlight=False)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
