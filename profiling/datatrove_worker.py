"""datatrove as a contestant of data_prepare.py, run by the Python of an environment that has it (pip install 'datatrove[processing]' spacy pyarrow).

    PYTHON datatrove_worker.py MIX OUT WORKERS TASKS

The text files below MIX, each a document, pass the filters of Gopher, C4 and FineWeb with the thresholds of `cllm prepare`, then the four stages of
MinHash with our 20 bands of 6 values over word 5-grams, and end as Parquet files; what a filter or a duplicate drops is kept beside them, as ours is.
The first stage of MinHash runs in the pipeline of the filters, which saves it from reading their result again. Prints one line of JSON:
{"documents", "kept", "kept_chars"}.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.readers.base import BaseDiskReader
from datatrove.pipeline.writers import ParquetWriter
from loguru import logger

BANDS, ROWS = 20, 6


class FileReader(BaseDiskReader):
    """Each file is a document; datatrove has readers of records alone."""

    name = "files"

    def read_file(self, filepath: str) -> Iterator[Document]:
        with self.data_folder.open(filepath, "rb") as file:
            document = self.get_document_from_dict({"text": file.read().decode("utf-8", "replace")}, filepath, 0)
        if document:
            yield document


def main() -> None:
    mix, out, workers, tasks = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    logger.remove()
    config = MinhashConfig(n_grams=5, num_buckets=BANDS, hashes_per_bucket=ROWS)

    def dropped(name: str) -> ParquetWriter:
        return ParquetWriter(str(out / "dropped" / name), compression="zstd")

    def stage(name: str, pipeline: list, tasks: int) -> None:
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=min(workers, tasks), logging_dir=str(out / "logs" / name), start_method="fork").run()

    # C4's rules that rewrite a text, or drop it at its first curly bracket, are off, as they are in ours.
    c4 = C4QualityFilter(
        exclusion_writer=dropped("c4"), filter_no_terminal_punct=False, filter_curly_bracket=False, filter_javascript=False, filter_policy=False,
        remove_citations=False, min_words_per_line=-1, max_word_length=-1,
    )  # fmt: skip
    filters = [
        GopherRepetitionFilter(exclusion_writer=dropped("repetition")),
        GopherQualityFilter(max_doc_words=None, exclusion_writer=dropped("quality")),
        c4,
        FineWebQualityFilter(char_duplicates_ratio=0.1, exclusion_writer=dropped("fineweb")),
    ]
    filtered, signed, buckets, removed = (str(out / name) for name in ("filtered", "signatures", "buckets", "removed"))
    stage("filter", [FileReader(mix), *filters, ParquetWriter(filtered, compression="zstd"), MinhashDedupSignature(signed, config)], tasks)
    stage("buckets", [MinhashDedupBuckets(signed, buckets, config=config)], BANDS)
    stage("cluster", [MinhashDedupCluster(buckets, removed, config=config)], 1)
    last = [ParquetReader(filtered), MinhashDedupFilter(removed, dropped("duplicates")), ParquetWriter(str(out / "kept"), compression="zstd")]
    stage("write", last, tasks)
    kept = [text for path in sorted((out / "kept").glob("*.parquet")) for text in pq.read_table(path, columns=["text"])["text"].to_pylist()]
    rows = sum(pq.read_metadata(path).num_rows for path in (out / "dropped").rglob("*.parquet"))
    print(json.dumps({"documents": len(kept) + rows, "kept": len(kept), "kept_chars": sum(map(len, kept))}))


if __name__ == "__main__":
    main()
