"""One split of a data set, as training and evaluation read it."""

from cllm.data.tokens.batch import EvaluationBatches, TrainingBatches
from cllm.data.tokens.fim import FillInTheMiddle
from cllm.data.tokens.loader import Batches
from cllm.data.tokens.shards import PackedTokens
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.data.tokens.windows import Windows


class TokenSplit(PackedTokens):
    """Packed text, cut into windows of any length. How a kind of data is cut is its split's own affair: training asks for `batches`, evaluation
    for `windows`, and neither needs to know the kind. Raises DataError as `PackedTokens` does."""

    document_noun = "document"  # what people call a document of it
    counts_all_bytes = True  # whether `num_bytes` is of all tokens

    def has_targets(self, seq_len: int) -> bool:
        """Whether windows of this length hold a token that can be predicted; without one there is nothing to train or evaluate on."""
        return self.num_tokens >= 2

    def batches(
        self, seq_len: int, batch_size: int, seed: int = 0, *, shuffle: str | bool = "epoch", document_mask: bool = False, fim_rate: float = 0.0
    ) -> TrainingBatches:  # fmt: skip
        """The endless sequence of training batches of (batch_size, seq_len) tokens; see `Batches` for the arguments and the errors raised.

        fim_rate: the share of the pieces of documents that are rearranged, so that the model learns to fill in the middle.
        """
        fim = FillInTheMiddle(Tokenizer.load(self.folder.parent / "tokenizer.json"), fim_rate) if fim_rate else None
        return Batches(self, seq_len, batch_size, seed, shuffle=shuffle, document_mask=document_mask, fim=fim)

    def windows(self, seq_len: int, batch_size: int = 8, *, document_mask: bool = False) -> EvaluationBatches:
        """The whole split once, in order, in batches of at most (batch_size, seq_len) tokens; see `Windows`."""
        return Windows(self, seq_len, batch_size, document_mask=document_mask)
