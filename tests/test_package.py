"""The package as a whole."""

import ast

from srlm_utils.paths import PACKAGE


def imports(path) -> set[str]:
    """Modules of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "srlm_utils":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("srlm_utils."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("srlm_utils.")}
    return found


def circles(graph: dict[str, set[str]]) -> set[str]:
    """What is left when modules that import nothing that is left are taken away, one after the other."""
    left = {name: used & graph.keys() for name, used in graph.items()}
    while free := {name for name, used in left.items() if not used}:
        left = {name: used - free for name, used in left.items() if name not in free}
    return {*left}


def test_no_module_imports_itself_through_others():
    graph = {path.stem: imports(path) for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    assert len(graph) > 50 and graph["plan"] >= {"params", "lineage"}
    assert circles(graph) == set()
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == {"a", "b", "c", "d"}
