"""Which documents hang together: equal band keys make edges, edges make groups. Candidates for duplicates, nothing more.

Documents are numbers in the order of their keys. The smallest number of a group stands for it, so neither the order of edges nor how they were cut
into parts shows in the result. Arithmetic of a billion documents: docs/data.md.
"""

import numpy as np

from cllm.data.clean.compiling import jit


def edges(keys: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """(E, 2) of the documents' dtype, sorted: from the smallest document of each key to each other one that has the key.

    `keys`: (M,) uint64, of one band or of several; 0 is the key of no band. `documents`: (M,) whole numbers. All rows of a key must be here, so rows
    are cut into parts by their keys (`part`), never by their documents.
    """
    order = np.lexsort((documents, keys))
    keys, documents = keys[order], documents[order]
    same = (keys[1:] == keys[:-1]) & (keys[1:] != 0)
    starts = np.flatnonzero(np.concatenate([[True], ~same])) if len(keys) else np.empty(0, np.int64)
    firsts = np.repeat(documents[starts], np.diff(np.append(starts, len(keys))))
    found = np.stack([firsts, documents], 1)
    return unique(found[found[:, 0] != found[:, 1]])


def unique(pairs: np.ndarray) -> np.ndarray:
    """(E, 2): the rows in ascending order, each once."""
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    new = np.ones(len(pairs), bool)
    new[1:] = (pairs[1:] != pairs[:-1]).any(1)
    return pairs[new]


def part(keys: np.ndarray, bits: int) -> np.ndarray:
    """(M,) which of 2^bits parts each key belongs to, by its first bits."""
    return (keys >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(keys), np.int64)


def forest(pairs: np.ndarray) -> np.ndarray:
    """(F, 2), sorted: the edges (smallest document of its group, document) that join the same groups as `pairs`.

    The result for some edges can be joined with that for others and made a forest again, in any order: the end is the same.
    """
    members, numbers = np.unique(pairs, return_inverse=True)
    smallest = roots(len(members), numbers.reshape(pairs.shape))
    joined = smallest != np.arange(len(members))
    return unique(np.stack([members[smallest[joined]], members[joined]], 1).reshape(-1, 2))


def roots(num_documents: int, pairs: np.ndarray) -> np.ndarray:
    """(num_documents,) uint32: the smallest document that each one is joined with, itself where with none smaller.

    `pairs`: (E, 2) of numbers below `num_documents`, which is at most 2^32. Union-find with path halving (Tarjan and van Leeuwen 1984).
    """
    parents = np.arange(num_documents, dtype=np.uint32)
    _unite(parents, pairs)
    return parents


def groups(num_documents: int, pairs: np.ndarray) -> list[np.ndarray]:
    """The documents of each group of two or more, ascending; groups by their smallest document."""
    smallest = roots(num_documents, pairs)
    members = np.unique(pairs)
    order = np.lexsort((members, smallest[members]))
    members = members[order]
    return np.split(members, np.flatnonzero(np.diff(smallest[members].astype(np.int64))) + 1) if len(members) else []


@jit
def _unite(parents, pairs):
    for i in range(len(pairs)):
        a, b = np.int64(pairs[i, 0]), np.int64(pairs[i, 1])
        while np.int64(parents[a]) != a:
            parents[a] = parents[parents[a]]
            a = np.int64(parents[a])
        while np.int64(parents[b]) != b:
            parents[b] = parents[parents[b]]
            b = np.int64(parents[b])
        if a < b:
            parents[b] = a
        elif b < a:
            parents[a] = b
    for i in range(len(parents)):  # a parent is smaller, so it is finished before
        parents[i] = parents[parents[i]]
