// Instructions and their operands.
#include <iterator>

#include "opcode.h"
#include "parser.h"

namespace ptx {
namespace {

// The slot of a special register, or -1. The machine fills them in this order.
int special_register(const std::string& name) {
  static const char* const names[] = {"%tid.x",    "%tid.y",    "%tid.z",   "%ntid.x",  "%ntid.y",
                                      "%ntid.z",   "%ctaid.x",  "%ctaid.y", "%ctaid.z", "%nctaid.x",
                                      "%nctaid.y", "%nctaid.z", "%laneid",  "%warpid",  "%lanemask_lt"};
  for (size_t i = 0; i < std::size(names); ++i) {
    if (name == names[i]) return static_cast<int>(i);
  }
  return name == "_" ? static_cast<int>(kSink) : -1;
}

}  // namespace

int64_t Parser::find_register(const std::string& name) const {
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto found = scope->registers.find(name);
    if (found != scope->registers.end()) return found->second;
  }
  return special_register(name);
}

const Parser::Place* Parser::find_in_frame(const std::string& name) const {
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto found = scope->memory.find(name);
    if (found != scope->memory.end()) return &found->second;
  }
  return nullptr;
}

bool Parser::find_symbol(const std::string& name, Operand* operand) const {
  const auto at = [&](uint32_t base, uint32_t offset) {
    operand->is_register = true;
    operand->number = base;
    operand->offset += offset;
    return true;
  };
  if (const Place* place = find_in_frame(name)) return at(kFrame, place->offset);
  for (const Parameter& p : function_->parameters) {
    if (p.name == name) return at(function_->is_entry ? kKernelParameters : kFrame, p.offset);
  }
  for (const Parameter& p : function_->results) {
    if (p.name == name) return at(kFrame, p.offset);
  }
  if (const auto shared = module_->shared.find(name); shared != module_->shared.end()) {
    operand->value = shared->second;
    return true;
  }
  const auto variable = module_->variables.find(name);
  if (variable == module_->variables.end()) return false;
  operand->value = variable->second.address;
  return true;
}

Operand Parser::parse_operand() {
  Operand operand;
  if (word() == "-" || std::isdigit(static_cast<unsigned char>(word()[0]))) {
    operand.value = take_number();
    return operand;
  }
  const std::string name = take();
  const int64_t found = find_register(name);
  if (found >= 0) {
    operand.is_register = true;
    operand.number = static_cast<uint32_t>(found);
  } else if (name == "WARP_SZ") {
    operand.value = 32;
  } else if (!find_symbol(name, &operand)) {
    fail("unknown operand " + name);
  }
  if (accept("+")) operand.offset += static_cast<int64_t>(take_number());
  return operand;
}

Operand Parser::parse_address() {
  Operand operand = parse_operand();
  while (!accept("]")) {
    if (word() != "-") expect("+");
    operand.offset += static_cast<int64_t>(take_number());
  }
  return operand;
}

void Parser::parse_instruction() {
  Instruction in;
  in.line = words_[at_].line;
  if (accept("@")) {
    in.negated = accept("!");
    in.guard = static_cast<int32_t>(find_register(take()));
    if (in.guard < 0) fail("unknown predicate");
  }
  const size_t begin = at_;
  const std::string name = take();
  if (name.compare(0, 4, "call") == 0) return parse_call(in);
  const auto add = [&](const Operand& operand) {
    if (in.count == std::size(in.operands)) fail("too many operands");
    in.operands[in.count++] = operand;
  };
  if (name.compare(0, 3, "bra") == 0) branches_.emplace_back(function_->code.size(), take());
  while (word() != ";") {
    if (accept("{")) {
      in.vector_at = in.count;
      do add(parse_operand());
      while (accept(","));
      expect("}");
      in.vector_width = static_cast<uint8_t>(in.count - in.vector_at);
    } else if (accept("[")) {
      add(parse_address());
    } else {
      add(parse_operand());
      if (accept("|")) {
        in.has_pair = true;
        add(parse_operand());
      }
    }
    if (!accept(",") && word() != ";") fail("unexpected " + word());
  }
  for (size_t i = begin; i < at_; ++i) in.text += (i == begin ? "" : " ") + words_[i].text;
  expect(";");
  try {
    decode(name, in);
  } catch (const std::runtime_error& error) {
    fail(std::string(error.what()) + ": " + in.text);
  }
  function_->code.push_back(in);
}

std::vector<Parser::Place> Parser::parse_passed() {
  std::vector<Place> places;
  expect("(");
  while (!accept(")")) {
    const Place* place = find_in_frame(take());
    if (place == nullptr) fail("unknown argument of a call");
    places.push_back(*place);
    accept(",");
  }
  return places;
}

// call.uni (retval0), name, (param0, param1);
void Parser::parse_call(Instruction in) {
  Call call;
  call.function = static_cast<uint32_t>(module_->functions.size() - 1);
  call.instruction = function_->code.size();
  if (word() == "(") {
    call.results = parse_passed();
    expect(",");
  }
  call.callee = take();
  if (accept(",")) call.arguments = parse_passed();
  expect(";");
  in.text = "call " + call.callee;
  decode("call", in);
  function_->code.push_back(in);
  calls_.push_back(call);
}

}  // namespace ptx
