"""Two ways of writing less in a recipe: a name alone for a name with options, and one value alone for a mapping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import (
    CoreSchema,
    InitErrorDetails,
    PydanticCustomError,
    ValidationError,
    core_schema,
)

from calibrate.errors import UserError

__all__ = ["Chosen", "Short"]


@dataclass(frozen=True)
class Chosen:
    """One of several named models, written ``{name: options}``, or ``name`` where every option has a default."""

    choices: Callable[[], Mapping[str, type[BaseModel]]]
    noun: str

    def __get_pydantic_core_schema__(self, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = self.choices()
        forms: list[CoreSchema | tuple[CoreSchema, str]] = []
        bare = [name for name, choice in choices.items() if _works_alone(choice)]
        if bare:
            forms.append(core_schema.literal_schema(bare))
        for name, choice in choices.items():
            options = handler.generate_schema(choice)
            value = core_schema.nullable_schema(options) if name in bare else options
            fields = {name: core_schema.typed_dict_field(value, required=True)}
            forms.append(core_schema.typed_dict_schema(fields, extra_behavior="forbid"))
        shape = core_schema.union_schema(forms) if forms else core_schema.literal_schema([""])
        return core_schema.no_info_plain_validator_function(self._read, json_schema_input_schema=shape)

    def _read(self, value: Any) -> BaseModel:
        choices = self.choices()
        if isinstance(value, BaseModel) and type(value) in choices.values():
            return value
        name, options = self._entry(value)
        if name not in choices:
            raise self._unknown(name, choices)
        try:
            return choices[name].model_validate(options, by_alias=True, by_name=False)
        except UserError as error:
            raise PydanticCustomError("fault", "{what}", {"what": error.what, "hint": error.hint, "key": name}) from None
        except ValidationError as error:
            raise _below(name, error) from None

    def _entry(self, value: Any) -> tuple[str, Any]:
        if isinstance(value, str):
            return value, {}
        if isinstance(value, dict) and len(value) == 1:
            ((name, options),) = value.items()
            return name, {} if options is None else options
        what = f"holds {len(value)} names, must hold one" if isinstance(value, dict) else f"is not the name of {self.noun}"
        hint = "Write `- name` or `- name: {option: value}`; options stand indented below the name."
        raise PydanticCustomError("fault", "{what}", {"what": what, "hint": hint, "subject": True})

    def _unknown(self, name: str, choices: Mapping[str, type[BaseModel]]) -> PydanticCustomError:
        what = f"{name[:60]!r} is not the name of {self.noun}"
        return PydanticCustomError("fault", "{what}", {"what": what, "given": name, "known": sorted(choices), "key": name})


@dataclass(frozen=True)
class Short:
    """A model that may be written as the value of its one most important field."""

    field: str
    value: Any
    """The type of that field, with its bounds and description."""

    def __get_pydantic_core_schema__(self, source: type[BaseModel], handler: GetCoreSchemaHandler) -> CoreSchema:
        whole = handler(source)
        alone = handler.generate_schema(self.value)

        def read(value: Any) -> Any:
            return value if isinstance(value, dict | source) else {self.field: value}

        shape = core_schema.union_schema([alone, whole])
        return core_schema.no_info_before_validator_function(read, whole, json_schema_input_schema=shape)


def _below(name: str, error: ValidationError) -> ValidationError:
    """The same error with ``name`` before every place in it."""
    details = [
        InitErrorDetails(
            type=PydanticCustomError(line["type"], "{message}", {**line.get("ctx", {}), "message": line["msg"]}),
            loc=(name, *line["loc"]),
            input=line["input"],
        )
        for line in error.errors(include_url=False)
    ]
    return ValidationError.from_exception_data(error.title, details)


def _works_alone(model: type[BaseModel]) -> bool:
    """Whether the name without options is complete: every option has a default, and the defaults go together."""
    try:
        model()
    except (ValidationError, UserError):
        return False
    return True
