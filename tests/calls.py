"""Every public function of tensors, called with some: for tests of what holds for all of them."""
