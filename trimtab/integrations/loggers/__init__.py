"""Mirror a record's signals to TensorBoard, Weights & Biases or MLflow while they are written.

Each mirror is a listener of a `Recorder`: the record stays the truth; a mirror that fails is dropped with a warning.

    recorder = Recorder(DIR, listeners=[TensorBoardMirror(DIR / "tensorboard")])
"""

from trimtab.integrations.loggers.mirror import Mirror
from trimtab.integrations.loggers.mlflow import MlflowMirror
from trimtab.integrations.loggers.tensorboard import TensorBoardMirror
from trimtab.integrations.loggers.wandb import WandbMirror

__all__ = ["Mirror", "MlflowMirror", "TensorBoardMirror", "WandbMirror"]
