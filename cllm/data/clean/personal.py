"""Personal data and secrets in a text: found by their form, replaced by what they are.

Secrets are always counted: keys whose makers gave them a prefix to be found by, passwords in addresses, private keys. Personal data (e-mail
addresses, telephone numbers, public IP addresses, as FineWeb does) is an option, since texts about people need not be private.
"""

import ipaddress
import re
from collections.abc import Callable
from re import Match

from cllm.data.clean.rules import Rules

_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:(?:[^-]|-(?!----)){0,20000}-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----)?"
)
# Each with the texts one of which stands in every match: looking for those first is many times faster.
_SECRETS = [
    (begins, re.compile(rf"(?<![A-Za-z0-9]){pattern}(?![A-Za-z0-9])"))
    for begins, pattern in [
        (("AKIA", "ASIA"), r"(?:AKIA|ASIA)[A-Z0-9]{16}"),  # Amazon
        (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"gh[pousr]_[A-Za-z0-9]{36,251}"),  # GitHub
        (("github_pat_",), r"github_pat_[A-Za-z0-9_]{22,251}"),
        (("glpat-",), r"glpat-[A-Za-z0-9_-]{20,100}"),  # GitLab
        (("xox",), r"xox[abeoprs]-[A-Za-z0-9-]{10,250}"),  # Slack
        (("_live_",), r"[srp]k_live_[A-Za-z0-9]{16,250}"),  # Stripe
        (("sk-",), r"sk-(?=[A-Za-z_-]{0,250}[0-9])[A-Za-z0-9_-]{20,250}"),  # servers of language models
        (("AIza",), r"AIza[A-Za-z0-9_-]{35}"),  # Google
        (("hf_",), r"hf_[A-Za-z0-9]{30,50}"),  # Hugging Face
        (("npm_",), r"npm_[A-Za-z0-9]{36}"),
        (("pypi-",), r"pypi-[A-Za-z0-9_-]{50,250}"),
        (("SG.",), r"SG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{32,64}"),  # SendGrid
        (("eyJ",), r"eyJ[A-Za-z0-9_-]{10,4000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,4000}"),  # JSON web tokens
    ]
]
_PASSWORD = re.compile(r"(?<=://)[^\s/:@]{1,100}:[^\s/@]{1,200}(?=@)")
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})(?:\.[A-Za-z0-9-]{1,63}){0,8}\.[A-Za-z]{2,24}(?![\w-])")
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\.?\w)")
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")  # all addresses of the public network begin so
_PHONE = re.compile(
    r"(?<![\w+.,-])(?:"
    r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){6,11}"  # +358 40 123 4567
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}-\d{3}-\d{4}|\d{3}\.\d{3}\.\d{4}"  # (555) 123-4567
    r"|0\d{1,4}[ /-]\d{3,4}(?:[ -]\d{2,5}){1,2}"  # 040 123 4567
    r")(?![\w]|[.,-]\d)"
)


def protect(text: str, rules: Rules) -> tuple[str, dict[str, int], str]:
    """The text with secrets and personal data replaced as the rules say, how many of each kind were found, and why it is dropped ("" where not).

    Kinds: "private_keys", "secrets", and where `personal_data` is on "emails", "phones", "ip_addresses".
    """
    counts: dict[str, int] = {}
    reason = ""

    def replace(kind: str, pattern: re.Pattern[str], by: str | Callable[[Match[str]], str]) -> None:
        nonlocal text
        taken = 0

        def one(match: Match[str]) -> str:
            nonlocal taken
            new = by if isinstance(by, str) else by(match)
            taken += new != match[0]
            return new

        replaced = pattern.sub(one, text)
        if taken:
            counts[kind] = counts.get(kind, 0) + taken
            if kind not in ("secrets", "private_keys") or rules.secrets == "mask":
                text = replaced

    if "PRIVATE KEY" in text:
        replace("private_keys", _PRIVATE_KEY, "[secret]")
        if rules.private_keys and "private_keys" in counts:
            reason = "private_keys: holds a private key"
    for begins, pattern in _SECRETS:
        if any(each in text for each in begins):
            replace("secrets", pattern, "[secret]")
    if "://" in text and "@" in text:
        replace("secrets", _PASSWORD, "[secret]")
    if rules.personal_data:
        if "@" in text:
            replace("emails", _EMAIL, "[email]")
        replace("ip_addresses", _IPV4, _public)
        if ":" in text:
            replace("ip_addresses", _IPV6, _public)
        replace("phones", _PHONE, "[phone]")
    return text, counts, reason


def _public(match: Match[str]) -> str:
    """ "[ip]" for an address that belongs to somebody; those of private networks and of documentation stay."""
    try:
        return "[ip]" if ipaddress.ip_address(match[0]).is_global else match[0]
    except ValueError:
        return match[0]
