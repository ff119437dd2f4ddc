"""Rows of a stream, encoded as they come."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import IterableDataset, _utils, get_worker_info
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_datasets_available

from tasft.data.encode import Encoding, Row, encode_stream


class RowStream(IterableDataset[Row]):
    """Encoded rows of a stream, each once whatever the number of `dataloader_num_workers`.

    Workers take rows in turn. A `datasets.IterableDataset` shares its own shards out among them.

    Args:
        dataset: What is iterated over anew in each epoch.
        tokenizer: Of the model.
        encoding: How rows become tokens.
        avoid: Whether rows to avoid are given too.
    """

    def __init__(
        self, dataset: Iterable[Any], tokenizer: PreTrainedTokenizerBase, encoding: Encoding, avoid: bool
    ) -> None:
        self.dataset, self.tokenizer, self.encoding, self.avoid = dataset, tokenizer, encoding, avoid
        self._part = (0, 1)

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        # Duplicates are told from all rows.
        if worker is not None and (self.encoding.duplicates != "keep" or not _shares_itself(self.dataset)):
            self._part = (worker.id, worker.num_workers)
            # A dataset that shares rows out by itself, as torch advises, would leave some out: here it gives all.
            _utils.worker._worker_info = None
        rows = encode_stream(self.dataset, self.tokenizer, self.encoding, self._part)
        return (row for row in rows if self.avoid or not row["avoid"])

    def set_epoch(self, epoch: int) -> None:
        """Passed on to a dataset that has several orders."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def _shares_itself(dataset: Iterable[Any]) -> bool:
    if not is_datasets_available():
        return False
    from datasets import IterableDataset as Shards

    return isinstance(dataset, Shards)
