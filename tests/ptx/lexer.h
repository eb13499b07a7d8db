// PTX text as words.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

struct Word {
  std::string text;  // empty at the end
  uint32_t line;
};

// Comments, and what is for debuggers alone (.loc, .file, .section), are left out.
std::vector<Word> words_of(const std::string& text);

}  // namespace ptx
