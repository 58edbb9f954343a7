"""What the corpus programs say of a corpus that they wrote."""

from typing import Any

from pretrain.data.manifest import Manifest
from tools.shared import console


def summary(manifest: Manifest) -> dict[str, Any]:
    """Return the counts people ask for first."""
    return manifest.model_dump(
        include={"documents", "empty_documents", "tokens", "text_bytes", "dtype", "fingerprint"}
    )


def show_corpus(prefix: str, manifest: Manifest, as_json: bool) -> None:
    """Prints what a corpus made of other files holds."""
    if as_json:
        console.print_json({"prefix": prefix} | summary(manifest))
    else:
        print(f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens")
