#include "lexer.h"

#include <cctype>

namespace ptx {
namespace {

bool is_part_of_a_name(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}

class Lexer {
 public:
  explicit Lexer(const std::string& text) : text_(text) {}

  std::vector<Word> run() {
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (std::isspace(static_cast<unsigned char>(c))) {
        step();
      } else if (starts_with("//") || starts_with(".loc") || starts_with(".file")) {
        skip_until("\n");
      } else if (starts_with("/*")) {
        skip_past("*/");
      } else if (starts_with(".section")) {
        skip_past("}");
      } else if (c == '"') {
        const size_t end = text_.find('"', at_ + 1);
        add(end == std::string::npos ? text_.size() : end + 1);
      } else {
        add(end_of_word());
      }
    }
    words_.push_back({"", line_});
    return std::move(words_);
  }

 private:
  bool starts_with(const char* what) const {
    return text_.compare(at_, std::char_traits<char>::length(what), what) == 0;
  }

  void step() {
    if (text_[at_++] == '\n') ++line_;
  }

  void skip_until(const char* what) {
    while (at_ < text_.size() && !starts_with(what)) step();
  }

  void skip_past(const char* what) {
    skip_until(what);
    at_ += std::char_traits<char>::length(what);
  }

  // "::" is inside the names of instructions (ld.global.L1::evict_last), ":" behind labels.
  size_t end_of_word() const {
    size_t end = at_;
    while (end < text_.size()) {
      if (is_part_of_a_name(text_[end])) {
        ++end;
      } else if (end > at_ && text_.compare(end, 2, "::") == 0) {
        end += 2;
      } else {
        break;
      }
    }
    return end == at_ ? at_ + 1 : end;
  }

  void add(size_t end) {
    words_.push_back({text_.substr(at_, end - at_), line_});
    at_ = end;
  }

  const std::string& text_;
  size_t at_ = 0;
  uint32_t line_ = 1;
  std::vector<Word> words_;
};

}  // namespace

std::vector<Word> words_of(const std::string& text) {
  return Lexer(text).run();
}

}  // namespace ptx
