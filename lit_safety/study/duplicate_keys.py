"""Finds keys that stand twice in a mapping, of which YAML readers silently keep the last."""

from __future__ import annotations

import yaml

from lit_safety.bounded import check_yaml
from lit_safety.errors import UserError


def refuse_duplicate_keys(content: bytes) -> None:
    """Complain about a YAML text in which a key stands twice in one mapping.

    Raises:
        UserError: there is one; the message names the key and both lines.
        yaml.YAMLError: it is no YAML.
    """
    check_yaml(content)
    left = [yaml.compose(content, Loader=yaml.SafeLoader)]
    seen: set[int] = set()
    while left:
        node = left.pop()
        if id(node) in seen:  # an alias stands for a node that stands elsewhere
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _refuse(node)
            left += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            left += node.value


def _refuse(mapping: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in mapping.value:
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(f"the key `{key.value}` stands twice, in lines {lines[key.value]} and {line}; keep one")
            lines[key.value] = line
