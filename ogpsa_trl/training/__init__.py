"""The trainers: TRL's, with the method around each optimizer step."""
