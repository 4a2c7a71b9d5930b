"""The settings of `cllm train DATA --follow`, which goes on learning while its text grows."""

from dataclasses import dataclass

from cllm.config.setting import Setting, setting, settings_of


@dataclass(frozen=True)
class FollowSettings:
    replay: float = setting(0.25, "With --follow: share of a round's text that is drawn from earlier rounds.", at_least=0.0, below=1.0)
    tolerance: float = setting(0.01, "With --follow: how much the loss of old text may rise in a round before the round is undone.", at_least=0.0)
    round_bytes: int = setting(100_000, "With --follow: bytes of new text that begin a round.", at_least=1, unit="bytes")
    look_every: float = setting(60.0, "With --follow: seconds between looks for new text.", above=0.0, unit="s")
    keep_text: int = setting(
        1_000_000_000, "With --follow: bytes of the text of earlier rounds that are kept to replay them.", at_least=0, unit="bytes"
    )


FOLLOW: dict[str, Setting] = {f"follow.{name}": each for name, each in settings_of(FollowSettings).items()}
