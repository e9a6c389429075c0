"""A loaded tagger of any family: an ONNX model, how its pixels become numbers, and its labels."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from captioning.onnx_session import OnnxSession
from captioning.plugin import ModelError, Pixels, Preparer, Row
from captioning.taggers.base import Label, tagger_rows


class OnnxTagger:
    """Pixels → probabilities of tags. rating_ids: outputs that are the four ratings, None for one it lacks."""

    def __init__(
        self,
        session: OnnxSession,
        *,
        preparer: Preparer,
        to_input: Callable[[Pixels], npt.NDArray[np.float32]],
        labels: Sequence[Label],
        rating_ids: Sequence[int | None],
        floor: float,
        is_logits: bool = False,
        label_file: Path,
    ) -> None:
        self.preparer = preparer
        self.batch_size = session.batch_size
        self._session = session
        self._to_input = to_input
        self._rating_ids = rating_ids
        self._tag_ids = np.array([n for n, label in enumerate(labels) if label.is_tag], dtype=np.int32)
        self._num_labels = len(labels)
        self._floor = floor
        self._is_logits = is_logits
        self._label_file = label_file
        self._check_number(session.num_values)

    def predict(self, batch: Pixels) -> list[Row]:
        """Return schema.TAGGER rows; batch: (N, side, side, 3) uint8. Raises ModelError."""
        values = self._session.run(self._to_input(batch))
        self._check_number(values.shape[-1])
        # Of thousands of logits most are far below 0; a second sigmoid would make all of them 0.5 … 0.73.
        if self._is_logits and values.size and (values >= 0).all() and (values <= 1).all():
            raise ModelError(
                f"{self._label_file.parent}: the tagger gives probabilities already; set activation = none"
            )
        probs = _sigmoid(values) if self._is_logits else values
        # Written so that NaN passes: it becomes a row's status.
        if (probs < -1e-3).any() or (probs > 1 + 1e-3).any():
            raise ModelError(f"{self._label_file.parent}: the tagger gives logits; choose another output or activation")
        return tagger_rows(probs, rating_ids=self._rating_ids, tag_ids=self._tag_ids, floor=self._floor)

    def _check_number(self, number: int | None) -> None:
        if number is not None and number != self._num_labels:
            raise ModelError(
                f"the tagger gives {number} values, {self._label_file.name} names {self._num_labels}: "
                "model and label file do not belong together"
            )


def _sigmoid(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)), dtype=np.float32)
