"""JSON and YAML from outside: plain values only, and one kind of error for whatever is wrong with a text."""

import json

# No row or config of this project is nested this deeply; what works on the values may use recursion.
DEEPEST = 100
# Values of a YAML file, counted once per reference: a file of some lines can otherwise stand for billions of them.
MOST_VALUES = 1_000_000


def parse_json(text: str | bytes):
    """The value of a JSON text. Raises ValueError, also for a text that is nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    # Most texts have too few brackets for it.
    brackets = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if sum(map(text.count, brackets)) > DEEPEST and _is_deeper(value, DEEPEST):
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    return value


def _is_deeper(value, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(isinstance(v, (dict, list)) and (levels == 1 or _is_deeper(v, levels - 1)) for v in inner)


def parse_yaml(text: str, loader_type: type | None = None):
    """The value of a YAML text. Tags cannot create Python objects.

    Args:
        loader_type: a subclass of yaml.SafeLoader; default: SafeLoader itself.

    Raises:
        ValueError: for whatever is wrong with the text.
    """
    import yaml

    try:
        loader = (loader_type or yaml.SafeLoader)(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    # Of a key that is no plain value, or an explicit tag that does not fit its value.
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"not plain keys and values ({error})") from None


def _check_size(root) -> None:
    """Raise ValueError for a YAML document that contains itself, or many copies of its parts, by references."""
    sizes, open_nodes = {}, set()

    def size(node) -> int:
        if id(node) in open_nodes:
            raise ValueError("a reference (*name) to a part that contains it")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            children = node.value if isinstance(node.value, list) else ()
            # The entries of a mapping are pairs of nodes.
            flat = [n for child in children for n in (child if isinstance(child, tuple) else (child,))]
            sizes[id(node)] = 1 + sum(map(size, flat))
            open_nodes.discard(id(node))
        return sizes[id(node)]

    if size(root) > MOST_VALUES:
        raise ValueError(f"references (*name) make it more than {MOST_VALUES:,} values")
