"""What a run gives to other programs: original single files, diffusers folders; read back before they count as done."""
