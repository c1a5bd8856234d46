from alignkit.reference import write_pages

write_pages()
