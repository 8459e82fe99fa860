"""Counts the keys of records that are not used, and reports them once per file.

Keys that are known to be metadata (source, date, score) are ignored. Any other unused key may be text that the author
of the data expects to be read, so it is reported:

    --input: a.jsonl: unused keys: title (1,000 records), abstract (998)

Files with the same unused keys share a line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

SHOWN = 12  # keys of a file that are named; the others are counted


def words(text: str) -> frozenset[str]:
    """The words of `text`, as a set; key lists are written this way here."""
    return frozenset(text.split())


# Names of metadata in corpora of text and of conversations.
HARMLESS = words(
    """
    id _id uid uuid guid idx index row row_id key hash sha sha1 sha256 md5 digest minhash_cluster_size cluster_id
    doc_id docid document_id record_id example_id sample_id question_id conv_id conversation_id conversation_hash
    prompt_id message_id session_id turn_id request_id user_id annotator_id
    source sources source_id dataset dataset_name dataset_id subset split partition origin provenance
    dump crawl snapshot shard file file_name filename file_path filepath path repo repo_name repo_path repository
    max_stars_repo_name max_stars_repo_path max_stars_count stars ext extension mime_type size bytes
    url urls link domain host warc_date warc_record_id
    meta metadata added version revision license licenses license_type copyright
    date time timestamp created created_at created_time creation_date updated updated_at published year
    lang language languages language_score lang_score programming_language locale country state
    category categories subcategory task task_type task_name topic topics tag tags keywords genre field level
    model model_name model_id generator generated_by engine author authors annotator user
    score scores int_score rating ratings quality quality_score fasttext_score edu_score perplexity ppl reward
    difficulty toxicity toxic redacted openai_moderation detoxify_moderation nsfw safety
    turn turns num_turns n_turns num_tokens n_tokens token_count tokens_count length len char_count word_count n_chars
    num_chars words_count __index_level_0__
    """
)


class Unread:
    """Counts unused keys, file by file."""

    def __init__(self) -> None:
        self._files: dict[str, Counter[str]] = {}

    def add(self, file: str, keys: Iterable[str], records: int = 1) -> None:
        """Count `keys` as unused in this many records of `file`."""
        for key in keys:
            self._files.setdefault(file, Counter())[key] += records

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Records by file and key."""
        return {file: dict(counts) for file, counts in self._files.items()}

    @property
    def total(self) -> dict[str, int]:
        """Records of all files by key, the most frequent first."""
        return dict(sum(self._files.values(), Counter()).most_common())

    def lines(self) -> Iterator[str]:
        """One line for each file, or for all files with the same keys; the most frequent keys come first."""
        alike: dict[frozenset[str], list[str]] = {}
        for file, counts in self._files.items():
            alike.setdefault(frozenset(counts), []).append(file)
        for files in alike.values():
            counts = sum((self._files[file] for file in files), Counter[str]())
            more = f" and {len(files) - 1:,} more files" if len(files) > 1 else ""
            yield f"{files[0]}{more}: unused keys: {listed(counts)}"


def listed(counts: dict[str, int]) -> str:
    """`title (1,000 records), abstract (998)`."""
    shown = [f"{printable(key)} ({count:,})" for key, count in Counter(counts).most_common(SHOWN)]
    if shown:
        shown[0] = f"{shown[0][:-1]} record{'' if shown[0].endswith('(1)') else 's'})"
    others = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {others:,} more keys" if others else "")


def unknown(keys: Iterable[str], read: Iterable[str]) -> list[str]:
    """Those of `keys` that are neither read nor harmless."""
    known = set(read)
    return [key for key in keys if key not in known and key.lower() not in HARMLESS]


def printable(text: str) -> str:
    """`text` with lone surrogates escaped; JSON can spell them, but UTF-8 cannot encode them."""
    return text.encode("utf-8", "backslashreplace").decode()
