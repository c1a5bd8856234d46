"""YAML as it was meant: what its loader takes in silence, and nobody means, is refused with its line."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from alignkit.errors import ConfigError

LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+$")  # 010 is 8 to YAML 1.1
BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?$")  # and 1:30 is 90


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str | int | float] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool):
                if key in seen:
                    raise ConfigError(
                        f"line {key_node.start_mark.line + 1}: the key {key!r} stands there twice; keep one"
                    )
                seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def _number(self, node: yaml.ScalarNode) -> int | float:
        if LEADING_ZERO.match(node.value) or BASE_60.match(node.value):
            raise ConfigError(
                f"line {node.start_mark.line + 1}: {node.value} would be read as another number; write it without "
                "leading zeros and colons, or in quotes"
            )
        make = self.construct_yaml_int if node.tag.endswith(":int") else self.construct_yaml_float
        return make(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader._number)


def read_yaml(text: str) -> object:
    """Raises ConfigError, without the file's name, for a key that stands twice in one mapping and for numbers that YAML
    1.1 reads in another base; yaml.YAMLError for what is no YAML."""
    return yaml.load(text, Loader=_Loader)
