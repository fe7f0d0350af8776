"""``xsd registry``: the registered adapters, and which of them are champions."""

from __future__ import annotations

from dataclasses import dataclass

NAME = "registry"
HELP = "List the registered adapters and their champions."


@dataclass(frozen=True)
class Config:
    pair: str | None = None
    """Only this pair's; null: all."""


def run(config: Config) -> None:
    from xsd.tracking import registry

    versions = registry.versions(config.pair)
    if not versions:
        print("no adapter is registered yet; xsd promote does that")
        return
    print(f"{'model':<24}{'version':<9}{'alias':<19}{'metric':<24}{'value':<9}run")
    for version in versions:
        tags = version.tags
        aliases = ", ".join(version.aliases)
        print(
            f"{version.name:<24}{version.version:<9}{aliases:<19}"
            f"{tags.get('metric_name', ''):<24}{tags.get('metric', '')[:7]:<9}{version.run_id}"
        )
