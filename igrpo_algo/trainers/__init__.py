"""iGRPO inside other trainers: one file per trainer, imported on request."""
