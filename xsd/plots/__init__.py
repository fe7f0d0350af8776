"""Records become data frames, and data frames plotly figures; the frames stand on their own."""
