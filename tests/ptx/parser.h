// The grammar of PTX, as far as nvcc and Triton write it.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "lexer.h"
#include "program.h"

namespace ptx {

class Parser {
 public:
  explicit Parser(const std::string& text) : words_(words_of(text)), module_(new Module) {}
  std::unique_ptr<Module> run();

 private:
  struct Place {
    uint32_t offset, size;
  };
  struct Scope {
    std::map<std::string, uint32_t> registers;
    std::map<std::string, Place> memory;  // in the frame
  };
  // A call, whose callee may come later in the text.
  struct Call {
    uint32_t function;
    size_t instruction;
    std::string callee;
    std::vector<Place> arguments, results;
  };
  struct Declaration {
    std::string space, name;
    Type type = Type::none;
    uint32_t align = 1, count = 1, size = 0;
    bool is_external = false;
  };

  const std::string& word(size_t ahead = 0) const { return words_[at_ + ahead].text; }
  std::string take() { return words_[at_++].text; }
  bool accept(const char* what);
  void expect(const char* what);
  [[noreturn]] void fail(const std::string& why) const;
  uint64_t take_number();

  void parse_function();
  void parse_body();
  void parse_variable();
  void initialize(char* memory, uint32_t element);
  Parameter parse_parameter();
  std::vector<Parameter> parse_parameters();
  Declaration parse_declaration();
  void declare_registers();
  void declare_in_frame();
  void parse_instruction();
  void parse_call(Instruction in);
  std::vector<Place> parse_passed();
  Operand parse_operand();
  Operand parse_address();
  bool find_symbol(const std::string& name, Operand* operand) const;
  const Place* find_in_frame(const std::string& name) const;
  int64_t find_register(const std::string& name) const;
  void place_in_shared(const Declaration& declared);
  void link_calls();

  std::vector<Word> words_;
  size_t at_ = 0;
  std::unique_ptr<Module> module_;
  Function* function_ = nullptr;
  std::vector<Scope> scopes_;
  std::map<std::string, uint32_t> labels_;
  std::vector<std::pair<size_t, std::string>> branches_;
  std::vector<Call> calls_;
};

}  // namespace ptx
