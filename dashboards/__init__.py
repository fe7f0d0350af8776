"""From tracked runs to one self-contained HTML: query, plots, page. No arithmetic here."""
