"""The licence that a text states about itself, as its SPDX identifier (https://spdx.org/licenses)."""

import re

_HEAD_CHARS = 8192
_SPDX = re.compile(r"SPDX-License-Identifier:[ \t]*\(?([A-Za-z0-9.+-]+(?:[ \t]+(?:WITH|OR|AND)[ \t]+[A-Za-z0-9.+-]+)*)")
_COMMENT = re.compile(r"^[ \t]*(?:[#;%!*/]+|//+|--+|\(\*|<!--|\.\.)?[ \t]?", re.MULTILINE)
_BLANKS = re.compile(r"\s+")
_OR_LATER = r"(?:any later version|or later|or \(at your option\))"
_PHRASES = (
    ("AGPL-3.0", r"GNU Affero General Public License"),
    ("LGPL", r"GNU (?:Lesser|Library) General Public License"),
    ("GPL", r"GNU General Public License|under the terms of the GPL|General Public License \(GPL\)"),
    ("Apache-2.0", r"Apache License,? Version 2\.0|apache\.org/licenses/LICENSE-2\.0"),
    ("MPL-2.0", r"Mozilla Public License,? v(?:\.|ersion) ?2\.0|mozilla\.org/MPL/2\.0"),
    ("EPL-2.0", r"Eclipse Public License (?:- )?v(?:\.|ersion)? ?2\.0"),
    ("EPL-1.0", r"Eclipse Public License (?:- )?v(?:\.|ersion)? ?1\.0"),
    ("BSL-1.0", r"Boost Software License,? (?:- )?Version 1\.0"),
    ("Unlicense", r"This is free and unencumbered software released into the public domain"),
    ("CC0-1.0", r"CC0 1\.0 Universal|creativecommons\.org/publicdomain/zero/1\.0"),
    ("CC-BY-SA-4.0", r"creativecommons\.org/licenses/by-sa/4\.0|Attribution-ShareAlike 4\.0 International"),
    ("CC-BY-SA-3.0", r"creativecommons\.org/licenses/by-sa/3\.0|Attribution-ShareAlike 3\.0"),
    ("CC-BY-4.0", r"creativecommons\.org/licenses/by/4\.0|Creative Commons Attribution 4\.0"),
    ("PSF-2.0", r"Python Software Foundation License|PSF LICENSE AGREEMENT|Licensed to PSF under a Contributor Agreement"),
    ("Zlib", r"This software is provided '?as-is'?, without any express or implied warranty.{0,300}subject to the following restrictions"),
    ("ISC", r"Permission to use, copy, modify, and/?(?:or)? ?distribute this software for any purpose with or without fee is hereby granted"),
    ("BSD", r"Redistribution and use in source and binary forms, with or without modification, are permitted"),
    ("MIT", r"Permission is hereby granted, free of charge, to any person obtaining a copy of this software|(?:under|the) MIT [Ll]icen[sc]e"),
    ("BSD-3-Clause", r"(?:governed by|under) (?:the |a )?(?:3-clause |new |modified )?BSD(?:-style)? [Ll]icen[sc]e"),
)  # fmt: skip
_COMPILED = tuple((licence, re.compile(pattern, re.IGNORECASE | re.DOTALL)) for licence, pattern in _PHRASES)
_WORDS = re.compile(r"licen[sc]e|permission|redistribut|public domain|as-is|creativecommons", re.IGNORECASE)
_VERSION = re.compile(r"version ([123](?:\.[01])?)|\bv([123](?:\.[01])?)\b", re.IGNORECASE)
_LATER = re.compile(_OR_LATER, re.IGNORECASE)
_THIRD_CLAUSE = re.compile(r"Neither the names? of|may not be used to endorse|used to endorse or promote", re.IGNORECASE)


def licence_of(text: str) -> str:
    """The licence named in the first lines of a text; empty where there is none that is known."""
    head = text[:_HEAD_CHARS]
    if not _WORDS.search(head):
        return ""
    named = _SPDX.search(head)
    if named:
        return " ".join(named[1].split())
    words = _BLANKS.sub(" ", _COMMENT.sub("", head))
    for licence, pattern in _COMPILED:
        found = pattern.search(words)
        if found is None:
            continue
        if licence in ("GPL", "LGPL"):
            return _gnu(licence, words[found.start() : found.start() + 600])
        if licence == "AGPL-3.0":
            return f"AGPL-3.0-{'or-later' if _LATER.search(words[found.start() : found.start() + 600]) else 'only'}"
        if licence == "BSD":
            return "BSD-3-Clause" if _THIRD_CLAUSE.search(words) else "BSD-2-Clause"
        return licence
    return ""


def _gnu(family: str, words: str) -> str:
    """Such as "GPL-2.0-or-later"; the family alone, "GPL", where no version is named."""
    found = _VERSION.search(words)
    if found is None:
        return family
    version = found[1] or found[2]
    number = version if "." in version else f"{version}.0"
    return f"{family}-{number}-{'or-later' if _LATER.search(words) else 'only'}"
