"""Where a result goes beside this machine: the settings of --push-to-hub."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, model_validator

from engine.config.settings import Settings, setting


def _repository(value: Any) -> Any:
    """`false` is nowhere, as other trainers spell it; `true` names no repository."""
    if value is True or str(value).lower() == "true":
        raise ValueError("a name is expected here, such as organisation/name")
    return None if value in (False, "", "false") else value


class Publishing(Settings):
    """Send the result to a repository of the hub."""

    push_to_hub: Annotated[str | None, BeforeValidator(_repository)] = setting(
        None, "Hub", "repository to send the result to, such as org/name; made if there is none"
    )
    private: bool = setting(False, "Hub", "make that repository private")
    commit_message: str | None = setting(None, "Hub", "words of the commit", min_length=1)

    @model_validator(mode="after")
    def _names_a_repository(self) -> Self:
        if self.push_to_hub is None and (self.private or self.commit_message is not None):
            raise ValueError(
                "`private` and `commit_message` are of what `push_to_hub` sends: name a repository"
            )
        if self.push_to_hub is not None and getattr(self, "random_weights", False):
            raise ValueError(
                "`random_weights` only measures, and a model of random weights is of no use to "
                "anybody: leave out `push_to_hub`"
            )
        return self
