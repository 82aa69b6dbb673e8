"""What the compiler derives for every entry of the catalogue, on three reference backbones.

``python -m peftref.cli.facts`` writes it anew into the package and into ``docs/catalogue.md``;
``peftref list`` reads it from there, so that a list needs no compiler run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from peftref.backbone.site_table import SiteTable
from peftref.errors import PeftRefError
from peftref.spec import load
from peftref.spec.catalogue import Entry, entries
from peftref.spec.loader import plain
from peftref.spec.template import Template

__all__ = ["FILE", "PAGE", "Facts", "digest", "facts_of", "known_facts", "listed", "page",
           "reference_tables", "shipped"]

FILE = Path(__file__).resolve().parents[1] / "data" / "catalogue.json"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "catalogue.md"

Facts = dict[str, Any]


def digest(entry: Entry) -> str:
    """Return what tells whether an entry's file changed."""
    return hashlib.sha256(entry.path.read_bytes()).hexdigest()[:16]


@cache
def known_facts() -> Mapping[str, Facts]:
    """Return the facts that the package ships, by name."""
    if not FILE.is_file():
        return {}
    return json.loads(FILE.read_text(encoding="utf-8"))


def reference_tables() -> dict[str, SiteTable]:
    """Return the site tables of BERT-base, T5-base and Llama 3.2 1B, from configurations alone."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        BertConfig,
        LlamaConfig,
        T5Config,
    )

    from peftref.backbone.hf import site_table

    t5 = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
    llama = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return {
            "bert-base": site_table(AutoModelForSequenceClassification.from_config(BertConfig())),
            "t5-base": site_table(AutoModelForSeq2SeqLM.from_config(t5)),
            "llama-3.2-1b": site_table(AutoModelForCausalLM.from_config(llama)),
        }


def listed(entry: Entry) -> Facts:
    """Return what an entry's file says of itself; needs no backbone."""
    template = entry.template
    body = plain(template.resolved({}))
    reference = body.get("reference") or {}
    return {
        "kind": entry.kind,
        "title": reference.get("paper", ""),
        "url": reference.get("url"),
        "places": list(dict.fromkeys(_places(template, body))),
        "values": {name: parameter.default for name, parameter in template.parameters.items()},
    }


def _places(template: Template, body: dict[str, list[dict[str, object]]]) -> Iterator[str]:
    if template.kind == "composition":
        for member in body.get("members", []):
            yield str(member.get("use", ""))
    for module in body.get("modules", []):
        site = module.get("site")
        if isinstance(site, dict):
            port = site.get("port", "output")
            text = str(site.get("select") or site.get("module"))
            yield text if port == "output" else f"{text}.{port}"


def facts_of(entry: Entry, tables: Mapping[str, SiteTable]) -> Facts:
    """Return what holds for an entry with its default parameters."""
    from peftref.cli.typology import typology
    from peftref.compiler import compile_table

    spec = load(entry.name)
    facts: Facts = {
        **listed(entry),
        "digest": digest(entry),
        "typology": [asdict(row) for row in typology(spec)],
        "couplings": sorted({c.name for c in spec.couplings}),
        "counts": {},
    }
    for name, table in tables.items():
        try:
            plan = compile_table(spec, table)
        except PeftRefError as error:
            facts["counts"][name] = str(error).splitlines()[0]
            continue
        facts["counts"][name] = plan.trainable_parameters
        if "mergeable" in facts:
            continue
        layers = max(sum(table.layers.values()), 1)
        edits = [edit for module in plan.modules for edit in module.edits]
        inside = sum(edit.write.site.layer is not None for edit in edits)
        facts |= {
            "insertions": f"{inside / layers:g} a layer" if inside else str(len(edits)),
            "mergeable": plan.properties.mergeable,
            "identity": plan.properties.identity_at_init,
            "generates": not plan.properties.mixes_tokens,
            "procedures": sorted({p.name for p in plan.procedures}),
            "served": [target for target, blockers in plan.servable.items() if not blockers],
        }
    return facts


def page(found: Mapping[str, Facts]) -> str:
    """Return the catalogue as a page of Markdown."""
    lines = [
        "# Catalogue", "",
        "Every technique and composition that peftref ships. The columns are those of PEFT-Ref "
        "(Sabry and Belz 2023); each value is derived from the specification by the compiler, "
        "none is declared. Trainable parameters are those of the default parameters, without the "
        "task head. `python -m peftref.cli.facts` writes this page.", "",
        f"{len(found)} entries.", "",
    ]
    for kind, title in (("technique", "Techniques"), ("composition", "Compositions")):
        lines += [f"## {title}", "", "| name | module | workspace | intra-connectivity | "
                  "inter-connectivity | parameters adapted | sharing | input | insertion | "
                  "integration | insertions | merges | identity at init | training | BERT-base | "
                  "T5-base | Llama 3.2 1B | paper |", "|" + "---|" * 18]
        for name in sorted(found):
            if found[name]["kind"] == kind:
                lines += _page_rows(name, found[name])
        lines.append("")
    return "\n".join(lines)


def _page_rows(name: str, facts: Facts) -> list[str]:
    title, url = facts["title"], facts["url"]
    rows: list[str] = []
    for index, row in enumerate(facts["typology"]):
        first = index == 0
        cells = [
            f"`{name}`" if first else "", row["module"].split(".", 1)[-1], row["workspace"],
            row["intra_connectivity"], row["inter_connectivity"], row["parameters_adapted"],
            row["sharing"], row["input_type"], row["insertion"], row["integration"],
        ]
        tail = [""] * 8
        if first:
            counts = [_count(facts["counts"][b]) for b in
                      ("bert-base", "t5-base", "llama-3.2-1b")]
            tail = [
                facts.get("insertions", ""), _yes(facts.get("mergeable")),
                _yes(facts.get("identity")), ", ".join(facts.get("procedures", [])) or "plain",
                *counts, f"[{title}]({url})" if url else title,
            ]
        rows.append("| " + " | ".join([*cells, *tail]) + " |")
    return rows


def _yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _count(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else "none"


def shipped() -> list[Entry]:
    """Return the techniques and compositions of the package."""
    return [e for e in entries().values() if e.shipped and e.kind != "macro"]


def main() -> None:
    """Derive all facts anew; write the data file and the page."""
    tables = reference_tables()
    found = {entry.name: facts_of(entry, tables) for entry in shipped()}
    FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    known_facts.cache_clear()
    PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
