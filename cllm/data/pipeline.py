"""From a folder of anything to packed tokens: read, split, train a tokenizer, pack. Each step is cached by the content it depends on.

    OUT/sources.json, sources.bin      what each file holds                         depends on the files' sizes, times and inodes
        tokenizer.json, training.json  the tokenizer that was trained, and on what  depends on the training documents and its settings
        tokens/                        the packed data set (see dataset.py)         depends on all documents, the split and the tokenizer;
                                       (with segments.json, see packing.py)         what earlier ones hold of unchanged files is copied
        tokens-DIGEST/                 instead, where those of other text are kept  (`keep_others`, as in the folder of a run)

Memory stays bounded: text is read, tokenized and written in pieces, whatever the size of the files.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cllm.data.documents.corpus import Corpus, describe, load_corpus
from cllm.data.documents.scan import Reading
from cllm.data.documents.sides import SplitPlan, plan_split
from cllm.data.packing import Earlier, pack
from cllm.data.tokens.dataset import FORMAT, VERSION, Dataset, folder_for, is_packed, left_out, read_info, token_words
from cllm.data.tokens.fim import check_fim
from cllm.data.tokens.tokenizer import KINDS, SAMPLE_BYTES, Tokenizer, train_on
from cllm.files import DATA, new_folder, write_file
from cllm.runtime.errors import DataError, UserError
from cllm.runtime.progress import ByteProgress
from cllm.runtime.quantities import counted, size

PACK_VERSION = 1

Log = Callable[[str], None]
Progress = Callable[[str, int, int], None]


def prepare(
    path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    vocab_size: int | None = None,
    val_fraction: float | None = None,
    *,
    pre_tokenizer: str = "gpt-2",
    sample_bytes: int = SAMPLE_BYTES,
    exclude: Iterable[str | os.PathLike[str]] = (),
    keep_others: bool = False,
    reading: Reading = Reading(),
    fim: bool = False,
    log: Log | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """The packed data set of a folder, file or JSONL of text; of a packed folder, itself. What `out_dir` already holds is used again.

    tokenizer: "bpe" (None), "wordpiece", "unigram" or "char" trains one; a Tokenizer or the path of a tokenizer.json is used as it is.
    vocab_size: of a new tokenizer, except "char"; None chooses by the amount of text (`default_vocab_size`).
    val_fraction: the share of the text for validation; None takes a tenth of small texts and less of large ones (`default_val_fraction`).
    exclude: places below `path` that are not data; out_dir never is.
    keep_others: never replaces packed tokens of other text, another split or another tokenizer; each get a folder of their own in out_dir.
    reading: which field of a record holds its text, and what separates the documents in a file of text.
    fim: whether the tokenizer needs the tokens for filling in the middle; UserError for a given one without them.
    log gets a sentence for each step; progress(step, bytes done, bytes in all) replaces the progress line.
    Raises DataError when there is no usable text, or it does not give both splits something.
    """
    tell = log or (lambda line: None)
    if is_packed(path):
        dataset = _use_packed(path, tokenizer, tell)
        if fim:
            check_fim(dataset.tokenizer)
        return dataset
    out, given = Path(out_dir), _given_tokenizer(tokenizer)
    if fim and given is not None:
        check_fim(given)
    with ByteProgress(progress) as bar:
        corpus = load_corpus(path, out, [out, *exclude], bar, reading)
        bar.end()
        plan = plan_split(corpus.rows, val_fraction)
        steps = [describe(corpus, plan, tell)]
        if corpus.num_chars < 2:
            raise DataError(f"{path} holds 1 character of text, too little to learn anything from. Give it more text.")
        if plan.sides is None and plan.cut(corpus.num_chars) < 1:
            raise DataError(
                f"of the {corpus.num_chars:,} characters of text in {path}, val_fraction={plan.val_fraction:g} leaves none for training. "
                "Give more text, or choose a smaller val_fraction."
            )
        chosen, step = _tokenizer(corpus, plan, out, given or str(tokenizer or "bpe"), vocab_size, pre_tokenizer, sample_bytes, fim, bar)
        tell(f"tokenizer: {step[2]} ({step[1]})")
        if chosen.losses:
            tell(f"  text does not come back from this tokenizer exactly: {'; '.join(chosen.losses)}")
        dataset, packed = _packed(corpus, plan, out, chosen, bar, keep_others)
        bar.end()
        tell(f"tokens: {packed[2]} ({packed[1]})")
    return Dataset(dataset.folder, dataset.train, dataset.val, dataset.tokenizer, dataset.info, [*steps, step, packed])


def _use_packed(path: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | Tokenizer | None, tell: Log) -> Dataset:
    given = _given_tokenizer(tokenizer)
    dataset = Dataset.open(path, None if given is None else given.hash)
    words = token_words(dataset.train, dataset.val)
    tell(f"tokens: {words}, packed before (cached)")
    for line in left_out(dataset.info):
        tell(f"  {line}")
    return Dataset(dataset.folder, dataset.train, dataset.val, dataset.tokenizer, dataset.info, [("tokens", "cached", words)])


def _given_tokenizer(tokenizer: str | os.PathLike[str] | Tokenizer | None) -> Tokenizer | None:
    """The tokenizer itself when one was given, None when one is to be trained."""
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    if isinstance(tokenizer, str) and tokenizer in KINDS:
        return None
    if isinstance(tokenizer, str) and not os.path.exists(tokenizer) and os.sep not in tokenizer and not tokenizer.endswith((".json", ".tiktoken")):
        raise UserError(f'tokenizer must be {", ".join(KINDS)} or the path of a tokenizer.json or a .tiktoken file, got "{tokenizer}".')
    return Tokenizer.load(tokenizer)


# -- tokenizer ------------------------------------------------------------------------------------------------------------------------


def _tokenizer(
    corpus: Corpus,
    plan: SplitPlan,
    out: Path,
    wanted: Tokenizer | str,
    vocab_size: int | None,
    pre_tokenizer: str,
    sample_bytes: int,
    fim: bool,
    bar: ByteProgress,
) -> tuple[Tokenizer, tuple[str, str, str]]:
    """The tokenizer and the step that made it. wanted: the tokenizer that was given, or the kind of one to train."""
    if isinstance(wanted, Tokenizer):
        return wanted, ("tokenizer", "given", f"{wanted.kind}, {wanted.vocab_size:,} tokens")
    kind = wanted
    settings = [PACK_VERSION, kind, vocab_size, pre_tokenizer, sample_bytes] if kind != "char" else [PACK_VERSION, kind, *(["fim"] if fim else [])]
    learned_from = _digest(settings, corpus.digest(), [plan.method, plan.val_fraction] if kind != "char" else [])
    try:
        record = json.loads((out / "training.json").read_text("utf-8"))
        if record["key"] == learned_from:
            tokenizer = Tokenizer.load(out / "tokenizer.json")
            if tokenizer.hash == record["tokenizer"]:
                return tokenizer, ("tokenizer", "cached", f"{kind}, {tokenizer.vocab_size:,} tokens")
    except (OSError, ValueError, KeyError, TypeError, DataError):
        pass  # never trained, or damaged: train
    tokenizer, sample = train_on(corpus, plan, kind, vocab_size, pre_tokenizer, sample_bytes, bar, fim)
    tokenizer.save(out / "tokenizer.json")
    record = {"key": learned_from, "tokenizer": tokenizer.hash, "settings": settings, "sample": asdict(sample)}
    write_file(out / "training.json", json.dumps(record, indent=1).encode("utf-8"), DATA)
    return tokenizer, ("tokenizer", "done", f"{kind}, {tokenizer.vocab_size:,} tokens, learned from {size(sample.bytes)} of text")


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts).encode("utf-8"), digest_size=16).hexdigest()


# -- packing --------------------------------------------------------------------------------------------------------------------------


def _packed(
    corpus: Corpus, plan: SplitPlan, out: Path, tokenizer: Tokenizer, bar: ByteProgress, keep_others: bool
) -> tuple[Dataset, tuple[str, str, str]]:
    key = _digest(PACK_VERSION, corpus.digest(), plan.method, plan.val_fraction, tokenizer.hash)
    folder = folder_for(out, "tokens", key, keep_others)
    info = {
        "format": FORMAT,
        "version": VERSION,
        "key": key,
        "tokenizer": tokenizer.hash,
        "split": {"method": plan.method, "val_fraction": plan.val_fraction},
        "num_files": len(corpus.files),
        "num_documents": len(corpus.rows),
        "skipped": corpus.skipped.to_dict(),
    }
    try:
        if read_info(folder)["key"] == key:
            found = Dataset.open(folder, tokenizer.hash)
            # The tokens are those of other files too: what was left out is told of these.
            dataset = Dataset(found.folder, found.train, found.val, found.tokenizer, {**found.info, **info})
            return dataset, ("tokens", "cached", token_words(dataset.train, dataset.val))
    except DataError:
        pass  # never packed, of other data, or damaged: pack
    earlier = Earlier.find(out, corpus, plan, tokenizer)
    with new_folder(folder, DATA) as temporary:
        copied = pack(corpus, plan, tokenizer, temporary, earlier, bar.step("Packing tokens", corpus.num_bytes))
        tokenizer.save(temporary / "tokenizer.json")
        write_file(temporary / "dataset.json", json.dumps(info, indent=1).encode("utf-8"), DATA)
    dataset = Dataset.open(folder, tokenizer.hash)
    words = token_words(dataset.train, dataset.val)
    return dataset, ("tokens", "done", f"{words}; those of {counted(copied, 'unchanged file')} were copied" if copied else words)
