"""A word-level vocabulary, small enough to need no tokenizer library."""

from collections.abc import Iterable

PAD, END, IMAGE = "<pad>", "<end>", "<image>"


class WordVocabulary:
    """Maps whitespace-separated words to ids: `<pad>` 0, `<end>` 1, `<image>` 2, then the words in order.

    Args:
        words: distinct words.
        size: number of ids; the ids past the last word stay unused. Default: as many as there are tokens.

    Raises:
        ValueError: a word is empty, holds whitespace or occurs twice, or `size` is too small for the words.
    """

    pad_token_id = 0
    end_token_id = 1
    image_token_id = 2

    def __init__(self, words: Iterable[str], size: int | None = None) -> None:
        tokens = [PAD, END, IMAGE, *words]
        self._ids = {token: token_id for token_id, token in enumerate(tokens)}
        if malformed := [token for token in tokens if token.split() != [token]]:
            raise ValueError(f"words must be non-empty and free of whitespace, got {malformed}")
        if len(self._ids) < len(tokens):
            repeated = [token for token_id, token in enumerate(tokens) if self._ids[token] != token_id]
            raise ValueError(f"words must be distinct and not special tokens, got more than one of {repeated}")
        size = len(tokens) if size is None else size
        if size < len(tokens):
            raise ValueError(f"3 special tokens + {len(tokens) - 3} words = {len(tokens)} > size {size}")
        self._tokens = tokens + [f"<unused{token_id}>" for token_id in range(len(tokens), size)]

    def __len__(self) -> int:
        """Number of ids, the unused ones included."""
        return len(self._tokens)

    def encode(self, text: str) -> list[int]:
        """Ids of the words of `text`; special tokens may be spelled out.

        Raises:
            KeyError: a word is not in the vocabulary.
        """
        words = text.split()
        if unknown := [word for word in words if word not in self._ids]:
            raise KeyError(f"no id for {unknown} of {text!r}; the known words are {' '.join(self._ids)}")
        return [self._ids[word] for word in words]

    def decode(self, ids: Iterable[int]) -> str:
        """Words of `ids` up to the first `<end>`, joined by spaces. Unused ids read `<unusedN>`.

        Raises:
            IndexError: an id is not below the vocabulary's size.
        """
        words = []
        for token_id in map(int, ids):
            if token_id == self.end_token_id:
                break
            words.append(self._tokens[token_id])
        return " ".join(words)
