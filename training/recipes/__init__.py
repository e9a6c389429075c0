"""What is trained and how the loss is made. One file per recipe; `load_recipe` in `base` names them."""
