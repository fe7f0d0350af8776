"""Room 6, draft and verify: acceptance, drafting, the engine, overlap of the two models."""
